"""The server of `icl-moe web`: the page at an address of this machine, until it is interrupted.

It is bound to loopback unless told otherwise, limits what may be uploaded, lets the page load
nothing from other hosts, and leaves no files behind.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from icl_moe.devices import Device
from icl_moe.errors import InputError
from icl_moe.inference.model import InContextModel
from icl_moe.web.work import MEGABYTES

MOST_AT_ONCE = 400
"""Megabytes of one request: all files that are dropped together."""

HEALTH = "/health"
"""A path that answers 200 while the server runs, such as for Docker's HEALTHCHECK."""

_PATIENCE = 2
"""Seconds that open connections get when the server ends: a page keeps one open as long as it is
shown.
"""

_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""The browser loads nothing from other hosts. Gradio's scripts are inline and compile templates."""


def serve(
    model: str | Path,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: Device | None = None,
    dtype: str | None = None,
) -> None:
    """Serve the page for a model until SIGINT or SIGTERM.

    port: 0 for any free one. Raises InputError if Gradio is not installed, if the address cannot be
    used, or as `InContextModel.from_pretrained` does.
    """
    with _listening(host, port) as listener, _own_folder():
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Read when it is imported.
        from icl_moe.web.page import build_page

        loaded = InContextModel.from_pretrained(model, device, dtype)
        page = build_page(loaded, Path(model).name or str(model))
        _say_where(listener, host)
        make_server(page, listener).run(sockets=[listener])


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound to the address."""
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host {host} is no address of this machine: 127.0.0.1 serves this machine alone, "
            "0.0.0.0 also others."
        ) from error
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise InputError(
                f"Port {port} of {host} cannot be used ({error.strerror}): choose another one "
                "with --port, or 0 for any free one."
            ) from error
        yield listener


_UPLOADS = "GRADIO_TEMP_DIR"
"""The environment variable that tells Gradio where to store uploaded files. It reads it again with
every request.
"""


@contextlib.contextmanager
def _own_folder() -> Iterator[None]:
    """A folder for uploaded files, which is removed at the end, also after SIGTERM."""
    before, folder_before = signal.signal(signal.SIGTERM, _end), os.environ.get(_UPLOADS)
    try:
        with tempfile.TemporaryDirectory(
            prefix="icl-moe-web-", ignore_cleanup_errors=True
        ) as folder:
            os.environ[_UPLOADS] = folder
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
        os.environ.pop(_UPLOADS, None)
        if folder_before is not None:
            os.environ[_UPLOADS] = folder_before


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def _say_where(listener: socket.socket, host: str) -> None:
    address, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    print(f"The page is at http://{where}:{port}/ (Ctrl-C ends it).", flush=True)
    if address not in ("127.0.0.1", "::1"):
        print("Everybody who reaches this address can use it: it asks for no password.", flush=True)


def make_server(page: Any, listener: socket.socket) -> Any:
    """The uvicorn server of a page that `build_page` made; `run(sockets=[listener])` runs it."""
    import fastapi
    import gradio as gr
    import uvicorn
    from fastapi.routing import Mount

    from icl_moe.web.page import appearance

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route(HEALTH, lambda: {"status": "ok"})
    address, port = listener.getsockname()[:2]
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=address,
        server_port=port,
        footer_links=[],
        run_history=False,
        max_file_size=int(MEGABYTES * 1e6),
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        **appearance(),
    )
    page.has_launched = True  # Otherwise Gradio does not check where the files of an input lie.
    app.add_middleware(_Guard)
    gradio_app: Any = next(route.app for route in app.routes if isinstance(route, Mount))
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_PATIENCE
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """As uvicorn's, but open pages are no reason to wait, and what is cut off no error."""
            gradio_app.stop_event.set()
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    return Server(config)


Messages = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class _Guard:
    """Refuses requests that are too large, that ask for files of other hosts, or that are for parts
    of Gradio which the page does not use; and tells browsers to load nothing from elsewhere.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Messages, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or not length.isdigit() or _is_too_much(int(length)):
            await _refuse(
                send, 413, f"A request must say its length, of at most {MOST_AT_ONCE} megabytes."
            )
            return
        if _FETCHED.search(scope["path"]):
            await _refuse(send, 403, "The page fetches nothing from other hosts.")
            return
        if _UNUSED.match(scope["path"]):
            await _refuse(send, 404, "The page has nothing at this address.")
            return

        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"content-security-policy", _POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _is_too_much(length: int) -> bool:
    return length > MOST_AT_ONCE * 1e6


_FETCHED = re.compile(r"/file[=/]+https?:", re.IGNORECASE)
"""A path at which Gradio would fetch a file from another host and pass it on."""

_UNUSED = re.compile(
    r"(/gradio_api)?/+(process_recording|deep_link|component_server|custom_component|proxy=|dev/|"
    r"(undo-)?vibe-|monitoring|profiling)"
)
"""Paths of Gradio's tools for developers, recordings and links. Some of them store what they are
sent, and leave it there; a recording would be given to ffmpeg, which opens files that it names.
"""


async def _refuse(send: Send, status: int, text: str) -> None:
    """Answer with one sentence without reading the request. The server holds its sender to the
    length it gave.
    """
    start = {"type": "http.response.start", "status": status}
    await send({**start, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
    await send({"type": "http.response.body", "body": text.encode()})
