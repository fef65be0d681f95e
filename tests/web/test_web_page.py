"""The page of `icl-moe web`: through Gradio's own client, and in a browser from a click to a
mask.
"""

import contextlib
import http.server
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="Gradio, the extra `web`, is not installed")

import httpx
from web.test_web_work import marked

from icl_moe.cli import main
from icl_moe.web.page import build_page
from icl_moe.web.serve import make_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """Serves a model's page in a thread of this process; returns its address."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))

        def start(model, name):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            server = make_server(build_page(model, name), listener)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            return f"http://127.0.0.1:{listener.getsockname()[1]}/"

        yield start


@pytest.fixture(scope="module")
def page(serving, demo):
    return serving(demo, "demo")


@pytest.fixture(scope="module")
def both_page(serving, both_tasks):
    return serving(both_tasks, "both")


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def masks_in(html: str) -> list[np.ndarray]:
    """The masks that a page of results offers for download."""
    found = re.findall(r'download="([^"]+_mask\.png)" href="data:image/png;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(b64decode(data)))) > 0 for _, data in found]


def test_gradios_client_gets_the_masks_of_segment(page, demo, scenes):
    from gradio_client import Client, handle_file

    folder, masks = scenes
    client = Client(page, verbose=False)
    try:
        answer = client.predict(marked(folder / "0.png"), None, None, api_name="/add_mask_example")
        assert "Nothing is marked" in str(answer)
        client.predict(marked(folder / "0.png", masks[0]), None, None, api_name="/add_mask_example")
        files = [handle_file(str(folder / f"{n}.png")) for n in (1, 2)]
        html = client.predict(files, "", api_name="/find_masks")
        for number, found in zip((1, 2), masks_in(html), strict=True):
            truth = demo.segment([(folder / "0.png", masks[0])], folder / f"{number}.png")
            assert np.mean(found == truth) > 0.999
        assert "no photographs to search" in client.predict([], "", api_name="/find_masks")
    finally:
        client.close()


def test_from_a_click_to_a_mask_in_a_browser(page, browser, demo, scenes):
    folder, masks = scenes
    tab = browser.new_page(viewport={"width": 1010, "height": 900})
    addresses, failed = [], []
    tab.on("request", lambda request: addresses.append(request.url))
    tab.on("pageerror", lambda error: failed.append(str(error)))
    tab.goto(page)
    find = tab.get_by_role("button", name="Find it in all of them")
    assert tab.locator(".icl-head").bounding_box()["width"] > 900
    find.click()
    tab.get_by_role("alert").filter(has_text="no photographs to search").wait_for()

    tab.locator(".icl-drop input").set_input_files(folder / "0.png")
    canvas = tab.locator(".icl-marker canvas")
    canvas.wait_for()
    place = canvas.bounding_box()
    middle = (place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    before = pixel_in_the_middle(canvas)
    tab.get_by_role("button", name="Brush").click()
    tab.mouse.move(*middle)
    tab.mouse.down()
    tab.mouse.move(middle[0] + 20, middle[1] + 20)
    tab.mouse.up()
    assert pixel_in_the_middle(canvas) != before
    tab.get_by_role("button", name="Undo").click()
    assert pixel_in_the_middle(canvas) == before
    tab.get_by_role("button", name="Box").click()
    rows, columns = np.nonzero(masks[0])
    height, width = masks[0].shape
    for x, y in ((columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)):
        tab.mouse.click(  # Within the canvas, if the object reaches its edge.
            place["x"] + min(x * place["width"] / width, place["width"] - 1),
            place["y"] + min(y * place["height"] / height, place["height"] - 1),
        )
    tab.get_by_role("button", name="Add the example").click()
    tab.locator(".icl-examples figure").wait_for()
    queries = tab.locator("input[type=file][multiple]")
    queries.set_input_files([folder / f"{number}.png" for number in range(1, 5)])
    tab.get_by_label("4.png").wait_for()
    find.click()
    tab.get_by_role("link", name="COCO JSON").wait_for()

    found = masks_in(tab.content())
    box = np.zeros_like(masks[0])
    box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    for number, mask_HW in enumerate(found, 1):
        truth = demo.segment([(folder / "0.png", box)], folder / f"{number}.png")
        assert np.mean(mask_HW == truth) > 0.98  # A click is exact to a pixel of the screen.
    assert len(found) == 4
    with tab.expect_download() as download:
        tab.get_by_role("link", name="COCO JSON").click()
    coco = json.loads(Path(download.value.path()).read_text())
    assert [each["file_name"] for each in coco["images"]] == [f"{n}.png" for n in range(1, 5)]
    tab.get_by_role("radio", name="Confidence").check()
    assert tab.locator(".icl-sure").first.is_visible()
    assert not tab.locator(".icl-mask").first.is_visible()
    assert not failed
    assert all(address.startswith((page, "data:", "blob:")) for address in addresses)
    tab.close()


def pixel_in_the_middle(canvas) -> list[int]:
    return canvas.evaluate(
        "c => [...c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data]"
    )


def test_what_is_transparent_is_shown_black_as_the_model_reads_it(page, browser, tmp_path):
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    tab = browser.new_page()
    tab.goto(page)
    tab.locator(".icl-drop input").set_input_files(tmp_path / "clear.png")
    canvas = tab.locator(".icl-marker canvas")
    canvas.wait_for()
    assert pixel_in_the_middle(canvas) == [0, 0, 0, 255]
    tab.close()


def test_by_keyboard_alone_at_the_width_of_a_phone(both_page, browser, scenes):
    folder, _ = scenes
    tab = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
    tab.goto(both_page)
    tab.get_by_role("tab", name="Captions").focus()
    tab.keyboard.press("Enter")
    panel = tab.get_by_role("tabpanel").filter(has=tab.get_by_label("What the box shows"))
    choosers = []
    tab.on("filechooser", lambda chooser: choosers.append(chooser))
    while not choosers:  # Showing a tab may build its controls anew, which takes the focus away.
        panel.locator(".icl-drop input[aria-label]").focus()
        tab.keyboard.press("Enter")
        tab.wait_for_timeout(500)
    choosers[0].set_files(folder / "0.png")
    panel.locator("canvas").wait_for()
    assert tab.evaluate("document.activeElement.tagName") == "CANVAS"
    for keys in (["ArrowLeft"] * 3 + ["ArrowUp"] * 2, ["ArrowRight"] * 5 + ["ArrowDown"] * 4):
        for key in keys:
            tab.keyboard.press(f"Shift+{key}")
        tab.keyboard.press("Enter")
    panel.get_by_text("The box is marked").wait_for()
    walk_to(tab, "What the box shows")
    tab.keyboard.type("a thing")
    walk_to(tab, "Add the example")
    tab.keyboard.press("Enter")
    panel.locator(".icl-examples figure").wait_for()
    panel.locator("input[type=file][multiple]").set_input_files(folder / "1.png")
    panel.get_by_label("1.png").wait_for()
    if panel.get_by_label("Name of the class").is_visible():
        panel.get_by_label("Name of the class").fill("star")
    walk_to(tab, "Caption them")
    tab.keyboard.press("Enter")
    panel.get_by_role("link", name="All captions (JSON)").wait_for()
    walk_to(tab, "Remove", "Shift+Tab")
    tab.keyboard.press("Enter")
    panel.get_by_text("No example yet.").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.locator(".icl-head").bounding_box()["width"] > 350
    tab.close()


def walk_to(tab, name: str, key: str = "Tab") -> None:
    """Press a key until the element of a name has the focus."""
    for _ in range(40):
        tab.keyboard.press(key)
        focused = "const e = document.activeElement; e.labels?.[0]?.innerText || e.innerText || ''"
        if tab.evaluate(f"() => {{ {focused.replace('; e', '; return e', 1)} }}").startswith(name):
            return
    raise AssertionError(f"{name} cannot be reached with {key}")


def test_a_request_that_is_too_large_is_refused_before_it_is_read(page):
    request = urllib.request.Request(page + "gradio_api/upload", b"x", method="POST")
    request.add_unredirected_header("Content-Length", str(10**9))
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 413


def test_files_of_the_server_cannot_be_fetched(page, scenes):
    for path in ("/etc/passwd", str(Path(__file__))):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{page}gradio_api/file={path}", timeout=10)


@pytest.mark.parametrize("route", ["file=", "file/", "file=/"])
def test_the_server_fetches_no_files_of_other_hosts(page, route):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{page}gradio_api/{route}https://icl-moe.invalid/x", timeout=10)
    assert refused.value.code == 403
    assert refused.value.read() == b"The page fetches nothing from other hosts."


class Visitor:
    """Speaks to a page as any program can: requests with JSON, of which nothing is checked here."""

    def __init__(self, page: str) -> None:
        self.client = httpx.Client(base_url=page, timeout=60)
        self.session = secrets.token_hex(8)
        events = self.client.get("config").json()["dependencies"]
        self.numbers = {event["api_name"]: event["id"] for event in events}

    def upload(self, path: Path) -> str:
        """The path that the server gave to a file."""
        files = {"files": (path.name, path.read_bytes())}
        return self.client.post("gradio_api/upload", files=files).json()[0]

    def by_queue(self, name: str, data: list) -> str:
        body = {"data": data, "fn_index": self.numbers[name], "session_hash": self.session}
        self.client.post("gradio_api/queue/join", json=body).raise_for_status()
        return self.client.get(f"gradio_api/queue/data?session_hash={self.session}").text

    def by_call(self, name: str, data: list) -> str:
        body = {"data": data, "session_hash": self.session}
        event = self.client.post(f"gradio_api/call/{name}", json=body).json()["event_id"]
        return self.client.get(f"gradio_api/call/{name}/{event}").text

    def by_run(self, name: str, data: list) -> str:
        body = {"data": data, "session_hash": self.session}
        return self.client.post(f"gradio_api/run/{name}", json=body).text

    def by_predict(self, name: str, data: list) -> str:
        body = {"data": data, "fn_index": self.numbers[name], "session_hash": self.session}
        return self.client.post("gradio_api/run/predict", json=body).text


ROUTES = ("by_queue", "by_call", "by_run", "by_predict")

NOT_UPLOADED = "A file was not uploaded to this page: choose it again."


def sent_file(path, **others) -> dict:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **others}


@pytest.fixture
def other_server():
    """The address of a server on this machine, and the paths that it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/secret.png", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("route", ROUTES)
def test_files_that_were_not_uploaded_are_not_read(
    page, scenes, tmp_path, monkeypatch, other_server, route, capfd
):
    folder, masks = scenes
    url, asked = other_server
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.png"
    shutil.copy(folder / "1.png", secret)
    Image.fromarray(masks[0]).save(tmp_path / "mask.png")
    visitor = Visitor(page)
    ask = getattr(visitor, route)
    image, mask = visitor.upload(folder / "0.png"), visitor.upload(tmp_path / "mask.png")
    ask("add_mask_example", [None, marked(folder / "0.png", masks[0]), None, None])
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    link = Path(image).with_name("link.png")
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    up = "../" * len(Path(image).parts)
    for file in (
        sent_file(secret),
        sent_file("secret.png"),
        sent_file("secret.png", is_stream=True),
        sent_file(f"{Path(image).parent}/{up}{secret}"),
        sent_file(link),
        sent_file(url),
        sent_file(url, url=url),
        sent_file("", url=url),
        {"url": url, "meta": {"_type": "gradio.FileData"}},
    ):
        for name, data in (
            ("find_masks", [None, [sent_file(image), file], "", False]),
            ("find_masks", [None, {"background": file, "layers": [file]}, "", False]),
            ("find_masks", [None, [sent_file(image)], [[file]], False]),
            ("add_mask_example", [None, "", file, sent_file(mask)]),
            ("add_mask_example", [None, "", sent_file(image), file]),
        ):
            answer = ask(name, data)
            assert NOT_UPLOADED in answer, (name, file)
            assert "base64" not in answer and "secret" not in answer
    assert not asked
    assert not list(uploads.rglob("secret.png")), "nothing is copied to the uploads, either"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("route", ROUTES)
def test_files_that_were_uploaded_are_read_and_nothing_else_that_is_said_of_them(
    page, scenes, tmp_path, other_server, route
):
    folder, masks = scenes
    url, asked = other_server
    Image.fromarray(masks[0]).save(tmp_path / "mask.png")
    visitor = Visitor(page)
    ask = getattr(visitor, route)
    image, mask = (
        sent_file(visitor.upload(path), url=url, orig_name="x.png", size=9, mime_type="image/png")
        for path in (folder / "0.png", tmp_path / "mask.png")
    )
    assert "data:image/jpeg;base64" in ask("add_mask_example", [None, "", image, mask])
    answer = ask("find_masks", [None, [image], "", False])
    assert "0_mask.png" in answer and "data:image/png;base64" in answer
    assert not asked


@pytest.fixture
def interruptible():
    """Programs that are started can be interrupted, also if these tests run in the background of a
    shell, where SIGINT is ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_command_and_its_files_without_a_word(tmp_path, interruptible):
    command = [sys.executable, "-m", "icl_moe", "web", "demo", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with (
        (tmp_path / "errors").open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert address, line
        port = int(address[1])
        wait_for_health(address[0])
        assert list(tmp_path.glob("icl-moe-web-*"))
        assert main(["web", "demo", "--port", str(port)]) == 2
        said_before = (tmp_path / "errors").read_text()
        with httpx.stream("GET", f"{address[0]}gradio_api/heartbeat/open") as open_page:
            assert next(open_page.iter_lines()) == "data: ALIVE"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        assert process.stdout.read() == ""
    assert (tmp_path / "errors").read_text() == said_before
    assert not list(tmp_path.glob("icl-moe-web-*"))


@pytest.mark.parametrize(
    "path",
    [
        "process_recording",
        "gradio_api/process_recording",
        "gradio_api/component_server",
        "gradio_api/deep_link?session_hash=x",
        "gradio_api/monitoring/summary",
        "gradio_api/proxy=https://icl-moe.invalid/x",
        "gradio_api/dev/reload",
    ],
)
def test_parts_of_gradio_that_the_page_does_not_use_are_closed(page, path):
    """A recording, for one, would be given to ffmpeg, which opens the files that it names."""
    answer = httpx.post(page + path, files={"files": ("a.m3u8", b"#EXTM3U\n/etc/passwd")})
    assert answer.status_code == 404 and answer.text == "The page has nothing at this address."


def wait_for_health(address: str) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(address + "health", timeout=5) as answer:
                assert json.load(answer) == {"status": "ok"}
                return
        except urllib.error.URLError:
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["demo", "--host", "no.such.host.invalid"], "is no address of this machine"),
        (["no/such/model", "--port", "0"], "no/such/model"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_sentence(arguments, told, capsys, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "of another page")
    assert main(["web", *arguments]) == 2
    printed = capsys.readouterr().err
    assert told in printed and printed.count("\n") == 1
    assert os.environ["GRADIO_TEMP_DIR"] == "of another page"


def test_files_that_are_no_images_are_named_and_the_others_are_done(page, scenes, tmp_path, capfd):
    folder, masks = scenes
    (tmp_path / "notes.txt").write_text("a note")
    (tmp_path / "list.pdf").write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    (tmp_path / "nothing").touch()
    Image.fromarray(masks[0]).save(tmp_path / "mask.png")
    visitor = Visitor(page)
    image, mask, *wrong = (
        sent_file(visitor.upload(path))
        for path in (
            folder / "0.png",
            *(tmp_path / name for name in ("mask.png", "notes.txt", "list.pdf", "nothing")),
        )
    )
    for pair in ([wrong[0], mask], [image, wrong[0]]):
        answer = visitor.by_queue("add_mask_example", [None, "", *pair])
        assert "notes.txt cannot be read; it is damaged or not an image" in answer
    visitor.by_queue("add_mask_example", [None, "", image, mask])
    answer = visitor.by_queue("find_masks", [None, [wrong[0], image, *wrong[1:]], "", False])
    assert "1 photograph done, 3 left out." in answer and "0_mask.png" in answer
    for name in ("notes.txt", "list.pdf", "nothing"):
        assert f"The image {name} " in answer
    assert "Traceback" not in capfd.readouterr().err
