"""A real JupyterLab in a real Chromium, driven as a user would: open a notebook, run it, hover, click, drag, press keys, look.

One server and one browser for all tests, one page for each notebook. What only the page knows (where a point of a plot lies on the
screen) is asked from plotly; what only the kernel knows is asked from the kernel, beside the browser. A page that spins answers
nothing, and some questions to it have no time limit: a thread ends the browser when pages stay open for too long."""
import contextlib, importlib.util, json, os, re, shutil, socket, subprocess, sys, threading, time, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT/".browser"                       # screenshots and the benchmark; git ignores it
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WIDE = (1280, 800)                               # a 13-inch screen
DONE = "everything has run"                      # what the last cell of a test's notebook prints
PATIENCE_S, MERCY_S = 180., 30.                  # how long the pages of one test may be open, up to three times that on a crowded machine; what Playwright's driver gets on top
ENDED = []                                       # what the watchdog has done, in sentences
LATE = []                                        # pages in which a widget took longer to load than anywidget waits

def chromium() -> str|None: return next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
def missing() -> str|None:
    "Why there can be no browser test here, or None."
    if importlib.util.find_spec("playwright") is None: return "playwright is not installed (pip install -c constraints.txt playwright)"
    if chromium() is None: return "there is no chromium on PATH (Debian: apt-get install -y chromium)"

def free_port() -> int:
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]

def until(fn, seconds: float, what: str, every: float=.05):
    "The first true value of `fn()`; AssertionError when there is none in time."
    end = time.monotonic()+seconds
    while True:
        if (v := fn()): return v
        if time.monotonic() > end: raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(every)

def notebook(cells): # sources, or the path of a notebook to copy -> a notebook whose last cell says that all have run
    import nbformat, nbformat.v4 as v4
    if isinstance(cells, Path):
        nb = nbformat.read(cells, 4)
        for c in nb.cells:
            if c.cell_type == "code": c.outputs = []         # what is seen in the test was made in the test
    else: nb = v4.new_notebook(metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, cells=list(map(v4.new_code_cell, cells)))
    nb.cells.append(v4.new_code_cell(f"print({DONE!r})"))
    return nb

def family(name: str) -> list: # processes that this one has started, directly or not, and whose name begins so
    import psutil
    out = []
    for p in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if p.name().startswith(name): out.append(p)
    return out

def end(name: str): # the family members of this name, at once
    import psutil
    for p in family(name):
        with contextlib.suppress(psutil.Error): p.kill()

class Lab:
    "The server, its folder of notebooks, its folder of data, and the browser."
    def __init__(self, folder, **env):
        self.folder, self.root, self.data, self.token, self.books, self.leaving = Path(folder), Path(folder)/"notebooks", Path(folder)/"data", "clam", [], {}
        dirs = {n: self.folder/n.lower() for n in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR", "CLAM_DATA")} | {"CLAM_DATA": self.data}
        for d in (self.root, *dirs.values()): d.mkdir(parents=True, exist_ok=True)
        self.runtime, self.settings = dirs["JUPYTER_RUNTIME_DIR"], dirs["JUPYTERLAB_SETTINGS_DIR"]
        self.set("@jupyterlab/apputils-extension/notification", fetchNews="false", checkForUpdates=False, doNotDisturbMode=True)
        port = free_port(); self.url = f"http://127.0.0.1:{port}"
        env = os.environ | {k: str(v) for k, v in dirs.items()} | {"OMP_NUM_THREADS": "1", "CLAM_QUIET": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"} | env
        self.log = open(self.folder/"server.log", "w")
        self.server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}",
            "--allow-root", f"--ServerApp.root_dir={self.root}", "--LabApp.news_url="], env=env, stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        until(lambda: self.server.poll() is not None or self._alive(), 120, "JupyterLab did not start", .2)
        assert self.server.poll() is None, (self.folder/"server.log").read_text()[-3000:]
        self.playwright = self.browser = self.since = None; self.patience, self.over = PATIENCE_S, threading.Event(); self.start(); threading.Thread(target=self._watch, daemon=True).start()
    def start(self): # a browser, and Playwright's driver; again where the watchdog has ended them
        from playwright.sync_api import sync_playwright
        with contextlib.suppress(Exception): self.playwright and self.playwright.stop()
        self.playwright = sync_playwright().start(); self.browser = self.playwright.chromium.launch(executable_path=chromium(), headless=True, args=FLAGS)
        self.context = self.browser.new_context(accept_downloads=False)          # one for all pages: what JupyterLab loads is loaded and compiled once
    def limit(self) -> float: return self.patience*min(3., max(1., os.getloadavg()[0]/(3*os.cpu_count()))) # a page that spins and its driver are two, waiting for other work is not hanging
    def _watch(self): # the watchdog: first Chromium goes, then the driver if it is still buried in what a page has sent
        gone = 0
        while not self.over.wait(.5):
            if (since := self.since) is None: gone = 0; continue
            if gone == 0 and time.monotonic()-since > (most := self.limit()): gone = 1; ENDED.append(f"{', '.join(b.name for b in self.books)} took more than {most:.0f} s: Chromium was ended"); end("chrom")
            elif gone == 1 and time.monotonic()-since > most+MERCY_S: gone = 2; end("node")
    def _alive(self) -> bool:
        with contextlib.suppress(OSError): return self.rest("GET", "status") is not None
        return False
    def rest(self, verb: str, path: str, body=None): # Jupyter's REST interface
        request = urllib.request.Request(f"{self.url}/api/{path}", method=verb, data=None if body is None else json.dumps(body).encode(), headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as r: text = r.read()
        return json.loads(text) if text else {}
    def set(self, plugin: str, **values): # a setting of JupyterLab, read when a page opens
        f = self.settings/f"{plugin}.jupyterlab-settings"; f.parent.mkdir(parents=True, exist_ok=True); f.write_text(json.dumps(values))
    def write(self, name: str, cells, first: str|None=None) -> str: # a notebook of these cells, or a copy of one, `first` before them; -> its name
        import nbformat
        nb = notebook(cells)
        if first: nb.cells.insert(0, nbformat.v4.new_code_cell(first))
        nbformat.write(nb, self.root/name)
        return name
    def open(self, name: str, theme: str="light", size=WIDE, sidebar: bool=False, patience: float=PATIENCE_S, script: str="") -> "Book": # `script` runs in the page before its own
        if not self.browser.is_connected(): self.start()
        if not self.books: self.since, self.patience = time.monotonic(), patience
        self.set("@jupyterlab/apputils-extension/themes", theme=f"JupyterLab {theme.title()}", **{"adaptive-theme": False})
        return Book(self, name, size, sidebar, script)
    def close(self):
        for b in self.books[:]: b.close()
        self.over.set()
        with contextlib.suppress(Exception): self.browser.close(); self.playwright.stop()
        self.server.terminate()
        try: self.server.wait(20)
        except subprocess.TimeoutExpired: self.server.kill()
        self.log.close()

# where a point of a plot lies on the screen, from plotly itself
POINT = """([trace, i]) => { const t = gd._fullData[trace], L = gd._fullLayout, r = gd.getBoundingClientRect(),
  X = L[(t.xaxis||'x').replace('x', 'xaxis')], Y = L[(t.yaxis||'y').replace('y', 'yaxis')]; return [r.left+X._offset+X.d2p(t.x[i]), r.top+Y._offset+Y.d2p(t.y[i])]; }"""
LONELY = """trace => { const t = gd._fullData[trace], L = gd._fullLayout, X = L.xaxis, Y = L.yaxis, n = Math.min(t.x.length, 4000), out = [],
  P = Array.from({length: n}, (_, i) => [X.d2p(t.x[i]), Y.d2p(t.y[i])]);
  for (let i = 0; i < n; i++) { let best = 1e9; if (!(P[i][0] > 20 && P[i][1] > 20 && P[i][0] < X._length-20 && P[i][1] < Y._length-20)) continue;
    for (let j = 0; j < n; j++) if (j != i) best = Math.min(best, (P[i][0]-P[j][0])**2+(P[i][1]-P[j][1])**2); out.push([best, i]); }
  return out.sort((a, b) => b[0]-a[0]).slice(0, 20).map(a => a[1]); }"""

# timed in the page itself: asking it from outside waits for whatever it is doing, and slows it down
FELT = """([event, selectors, most]) => { window.felt = new Promise(done => {
  const says = el => el.innerText+[el, ...el.querySelectorAll('*')].map(e => e.src || e.currentSrc || '').join(), before = new Map(selectors.map(s => [s, says(document.querySelector(s))])); let start = null;
  document.addEventListener(event, () => { start = performance.now(); }, {capture: true, once: true}); setTimeout(() => done(null), most);
  for (const s of selectors) new MutationObserver((_, watch) => { const el = document.querySelector(s); if (start === null || !el || says(el) === before.get(s)) return;
    watch.disconnect(); before.delete(s); if (!before.size) requestAnimationFrame(() => setTimeout(() => done((performance.now()-start)/1000))); }).observe(document.querySelector(s), {subtree: true, childList: true, attributes: true, characterData: true}); }); }"""

class Book:
    "One notebook in one page."
    def __init__(self, lab: Lab, name: str, size, sidebar: bool, script: str):
        self.lab, self.name, self.errors, self.console = lab, name, [], []; lab.books.append(self)
        if name in lab.leaving: lab.leaving.pop(name).join(60)                      # a kernel on its way out, to which the server would connect this page
        self.session = lab.rest("POST", "sessions", {"path": name, "name": name, "type": "notebook", "kernel": {"name": "python3"}})   # else Run All can come before the kernel is connected, and is lost
        self.kernel = self.session["kernel"]["id"]
        self.page = lab.context.new_page(); self.page.set_viewport_size({"width": size[0], "height": size[1]}); self.page.set_default_timeout(30_000)
        self.page.on("pageerror", lambda e: self._wrong(str(e)))
        if script: self.page.add_init_script(script)
        self.page.on("console", lambda m: self.console.append(m.text) if m.type == "error" else None)
        self.page.goto(f"{lab.url}/lab/workspaces/w{len(lab.books)}-{int(time.time())}/tree/{name}?token={lab.token}")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        if not sidebar and self.page.locator("#jp-left-stack").is_visible(): self.page.keyboard.press("Control+b")
        self.idle()
    def _wrong(self, error: str): (LATE.append(self.name) if error.startswith("[anywidget] Failed to initialize model") else self.errors.append(error)) # figures listen all the same; a test that needs another widget fails by itself
    def idle(self, seconds: float=60): until(lambda: self.lab.rest("GET", f"kernels/{self.kernel}")["execution_state"] == "idle", seconds, f"the kernel of {self.name} is busy", .1)
    def running(self) -> int: return self.page.locator(".jp-InputPrompt", has_text="[*]").count() # cells with a star; the kernel itself is idle between two messages while a cell awaits
    def menu(self, *labels): # e.g. menu("Run", "Run All Cells")
        self.page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{labels[0]}$")).click()
        for l in labels[1:]: self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{re.escape(l)}$")).click()
    def printed(self, words: str) -> bool: return self.page.locator(".jp-OutputArea-output pre", has_text=words).count() > 0
    def run_all(self, seconds: float=90, wait: bool=True, via=("Run", "Run All Cells")):
        self.menu(*via)
        if wait: self.finish(seconds)
        return self
    def restart_and_run_all(self, seconds: float=90):
        self.menu("Kernel", "Restart Kernel and Run All Cells…")
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()
        until(lambda: not self.printed(DONE), 30, "outputs were not cleared by a restart")
        self.finish(seconds)
    def finish(self, seconds: float=90): # until the last cell has printed
        def over():
            if self.traces(): raise AssertionError(f"{self.name}: a cell failed:\n{self.traces()[0][-1500:]}")
            return self.printed(DONE)
        until(over, seconds, f"{self.name} has not run to its end", .1)
    def read_through(self, *selectors) -> list[int]: # scroll from top to bottom; -> in how many cells each of these was seen (JupyterLab takes cells out of sight off the page)
        seen = [set() for _ in selectors]; page = ".jp-WindowedPanel-outer"; self.page.locator(page).first.evaluate("e => e.scrollTop = 0")
        while True:
            self.page.wait_for_timeout(250)
            for s, found in zip(selectors, seen): found |= set(self.page.evaluate("s => [...document.querySelectorAll(s)].map(e => e.closest('.jp-Cell')?.dataset.windowedListIndex ?? '')", s))
            if self.page.locator(page).first.evaluate("e => { const before = e.scrollTop; e.scrollTop += 500; return e.scrollTop == before; }"): return list(map(len, seen))
    def traces(self) -> list[str]: return self.page.locator(".jp-OutputArea-output", has_text="Traceback (most recent call last)").all_inner_texts() # tracebacks shown in the notebook
    def ask(self, expression: str, seconds: float=30): # a value of the kernel, as JSON
        from jupyter_client import BlockingKernelClient
        kc = BlockingKernelClient(connection_file=str(self.lab.runtime/f"kernel-{self.kernel}.json")); kc.load_connection_file(); kc.start_channels()
        try:
            reply = kc.execute("", silent=True, user_expressions={"v": f"__import__('json').dumps({expression})"}, reply=True, timeout=seconds)["content"]["user_expressions"]["v"]
            assert reply["status"] == "ok", reply
            return json.loads(eval(reply["data"]["text/plain"]))
        finally: kc.stop_channels()

    # ---- what is on the page
    def all(self, selector: str): return self.page.locator(selector if selector[0] in ".#[" else f".{selector}") # all of a class (`clam-map`) or a CSS selector
    def at(self, selector: str): # the first visible one, scrolled into view
        found = self.all(selector).locator("visible=true").first
        for tries in range(4, -1, -1):
            found.wait_for()
            try: found.scroll_into_view_if_needed(); return found
            except Exception as e:                   # JupyterLab has just put another in its place
                if not tries or "not attached" not in str(e): raise
    def shows(self, selector: str) -> str: return self.all(selector).first.inner_text()
    def picture(self, selector: str) -> str: return self.all(selector).first.evaluate("e => (e.matches('img, video') ? e : e.querySelector('img, video')).src") # address of what is shown: another picture, another address
    def changed(self, read, action, seconds: float=20, what: str="the page did not change"): # -> (new value of `read()`, seconds it took)
        before = read(); start = time.perf_counter(); action()
        after = until(lambda: (v,) if (v := read()) != before else None, seconds, what, .005)[0]
        return after, time.perf_counter()-start

    def felt(self, event: str, action, *selectors: str, seconds: float=20) -> float:
        "Seconds that a person waits: from the event `action` causes (mousedown, keydown) to the page's next frame after each of these parts shows something else."
        self.page.evaluate(FELT, [event, [s if s[0] in ".#[" else f".{s}" for s in selectors], 1000*seconds]); action()
        took = self.page.evaluate("window.felt"); assert took is not None, f"not all of {', '.join(selectors)} changed within {seconds:g} s"
        return took

    # ---- plots
    def plot(self, selector: str, js: str, arg=None): # a function of `arg` in the page, where `gd` is the plot
        return self.at(selector).evaluate("(el, arg) => { const gd = el.matches('.js-plotly-plot') ? el : el.querySelector('.js-plotly-plot'); return ("+js+")(arg); }", arg)
    def points(self, selector: str) -> int: return self.plot(selector, "() => gd && gd._fullData ? gd._fullData.reduce((n, t) => n + (t.visible === true && t.x ? t.x.length : 0), 0) : 0") # drawn so far
    def drawn(self, selector: str, points: int=1, seconds: float=90): # plotly itself is 5 MB to load and may take its time
        self.all(selector).locator("visible=true").first.wait_for(timeout=1000*seconds); until(lambda: self.points(selector) >= points, seconds, f"{selector} has not drawn {points} points")
    def xy(self, selector: str, i: int, trace: int=0): return tuple(self.plot(selector, POINT, [trace, i]))
    def lonely(self, selector: str, trace: int=0) -> list[int]: return self.plot(selector, LONELY, trace) # up to 20 points far from all others, loneliest first
    def hover(self, x: float, y: float): # scattergl wants a real hover before a click
        self.page.mouse.move(x-3, y-3); self.page.mouse.move(x, y, steps=3); self.page.wait_for_timeout(120)
    def press(self): self.page.mouse.down(); self.page.mouse.up()
    def click_point(self, selector: str, i: int, trace: int=0): self.hover(*self.xy(selector, i, trace)); self.press()
    def drag(self, *corners, steps: int=6, pause: int=120): # press at the first corner, pass through the others, release
        self.page.mouse.move(*corners[0]); self.page.wait_for_timeout(pause); self.page.mouse.down()
        for c in corners[1:]: self.page.mouse.move(*c, steps=steps); self.page.wait_for_timeout(pause)
        self.page.mouse.up()
    def mode(self, selector: str, name: str): # a button of the plot's own bar: "Lasso Select", "Box Select", "Pan"
        el = self.at(selector); el.hover(); el.locator(f'.modebar-btn[data-title="{name}"]').first.click()
    def inside(self, selector: str, fx: float, fy: float): # a place within the plotting area, as fractions from its left and top
        return tuple(self.plot(selector, "([fx, fy]) => { const s = gd._fullLayout._size, r = gd.getBoundingClientRect(); return [r.left+s.l+fx*s.w, r.top+s.t+fy*s.h]; }", [fx, fy]))
    def lasso(self, selector: str, x0=.2, y0=.2, x1=.8, y1=.8): # around the middle, unless told
        self.drag(*(self.inside(selector, x, y) for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0))))

    # ---- controls
    def slide(self, selector: str, key: str="ArrowRight", times: int=1):
        handle = self.at(selector).locator(".noUi-handle").first; handle.focus()
        for _ in range(times): self.page.keyboard.press(key)
    def choose(self, selector: str, label: str): self.at(selector).locator("select").select_option(label=label)
    def button(self, selector: str): el = self.at(selector); (el if el.evaluate("e => e.tagName == 'BUTTON'") else el.locator("button").first).click()
    def tab(self, label: str): self.page.locator(".lm-TabBar-tab", has_text=re.compile(f"^{label}$")).locator("visible=true").first.click()

    # ---- pictures
    def shot(self, name: str, selector: str|None=None):
        PICTURES.mkdir(exist_ok=True); path = PICTURES/f"{name}.png"
        self.page.mouse.move(5, 5)
        (self.at(selector) if selector else self.page).screenshot(path=path)
        return path
    def close(self):
        if self in self.lab.books:
            with contextlib.suppress(Exception): self.page.close()      # the browser may be gone
            self.lab.books.remove(self); self.lab.since = self.lab.since if self.lab.books else None
            def gone(id=getattr(self, "session", {}).get("id")):
                with contextlib.suppress(OSError): self.lab.rest("DELETE", f"sessions/{id}")
            self.lab.leaving[self.name] = t = threading.Thread(target=gone, daemon=True); t.start()   # a kernel takes seconds to end
