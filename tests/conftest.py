"""What holds for all tests."""
import signal

# a shell that starts `make test` in the background has it ignore SIGINT, and every process below inherits that: tests that interrupt would fail
signal.signal(signal.SIGINT, signal.default_int_handler)
