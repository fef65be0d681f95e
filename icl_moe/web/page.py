"""The layout of the page, in Gradio. What it computes is in `work` and `cards`.

Importing this module raises InputError if Gradio is not installed.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from icl_moe.errors import InputError
from icl_moe.inference.model import InContextModel
from icl_moe.pages import render
from icl_moe.web import cards, work
from icl_moe.web.work import Example

try:
    import gradio as gr
except ImportError as error:
    raise InputError(
        f"The page needs Gradio, which cannot be used here ({error}): "
        "`pip install 'icl-moe[web]'` installs it."
    ) from error

_HOUR = 3600

_QUEUE = 20
"""Runs that may wait; the model serves one after the other."""


def build_page(model: InContextModel, name: str) -> gr.Blocks:
    """The page for a model. name: what the page calls it."""
    with _Page(
        title=f"{name} · icl-moe", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)
    ) as page:
        gr.HTML(_head(model, name))
        tabs = [_Tab(model, captions=False)] if work.can_segment(model) else []
        tabs += [_Tab(model, captions=True)] if work.can_caption(model) else []
        if len(tabs) == 1:
            tabs[0].build()
        else:
            with gr.Tabs():
                for tab in tabs:
                    with gr.Tab("Captions" if tab.captions else "Masks"):
                        tab.build()
    page.queue(max_size=_QUEUE, default_concurrency_limit=1)
    return page


def appearance() -> dict[str, Any]:
    """The theme, whose fonts are the system's, and the styles, as Gradio's mount takes them."""
    font = ("system-ui", "sans-serif")
    theme = gr.themes.Default(
        primary_hue="teal", secondary_hue="teal", font=font, font_mono=("ui-monospace", "monospace")
    )
    return {"theme": theme, "css": _asset("page.css")}


class _Page(gr.Blocks):
    """A page that takes no file but those that were uploaded to it.

    A browser sends the path of its upload, and other programs can send any path. Gradio's own check
    is off unless Gradio launches the server itself, and what it lets through it copies at once to
    the folder of uploads. So the paths are checked here, where the inputs of all events arrive.
    """

    async def preprocess_data(
        self, block_fn: Any, inputs: Sequence[Any], *others: Any, **named: Any
    ) -> list[Any]:
        try:
            checked = work.only_uploaded(inputs, self.GRADIO_CACHE)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return await super().preprocess_data(block_fn, checked, *others, **named)


class _Tab:
    """Examples, photographs and results of one task: masks, or captions."""

    def __init__(self, model: InContextModel, captions: bool) -> None:
        self.model, self.captions = model, captions
        self.named = model.format.class_prompt or (captions and model.format.category != "none")

    def build(self) -> None:
        one = work.capacity(self.model) == 1
        self.examples = gr.State((), time_to_live=_HOUR)
        with gr.Row():
            with gr.Column(min_width=320):
                gr.HTML(_step(1, "Show what you mean"))
                self._build_inputs()
                label = "Use as the example" if one else "Add the example"
                self.add = gr.Button(label, variant="secondary")
                self.shown = gr.HTML(cards.examples_page(()), js_on_load=_REMOVE)
            with gr.Column(min_width=320):
                gr.HTML(_step(2, "Add the photographs to search"))
                # Files of any type: one that is no image is named when it is read, where Gradio
                # would refuse the whole request.
                self.queries = gr.File(
                    file_count="multiple",
                    height=220,
                    label=f"Photographs, at most {work.MOST_PHOTOGRAPHS}",
                )
                if not self.captions:
                    self.category = self._category()
                    self.closer = gr.Checkbox(
                        label="Look again from closer up, for small objects (up to ten times "
                        "slower)"
                    )
                verb = "Caption them" if self.captions else "Find it in all of them"
                with gr.Row():
                    self.run = gr.Button(verb, variant="primary", scale=4, min_width=200)
                    self.stop = gr.Button("Stop", scale=1, min_width=70)
        self.results = gr.HTML(elem_classes="icl-outcome")
        self._connect()

    def _build_inputs(self) -> None:
        if self.captions:
            self.marker = self._marker("box")
            self.caption = gr.Textbox(
                label="What the box shows, in words", max_lines=2, max_length=500
            )
            self.category = self._category()
            return
        with gr.Tabs():
            with gr.Tab("Mark it here"):
                self.marker = self._marker("all")
            with gr.Tab("Upload a mask"):
                self.photograph = gr.File(height=160, label="The photograph of the example")
                self.mask = gr.File(height=160, label="Its mask: white on black, of the same size")

    def _category(self) -> gr.Textbox:
        return gr.Textbox(
            label="Name of the class" + ("" if self.named else " (for the COCO file)"),
            visible=self.named or not self.captions,
            max_lines=1,
            max_length=100,
        )

    def _marker(self, tools: str) -> Any:
        return gr.HTML(
            "",
            html_template=_asset("marker.html"),
            js_on_load=_asset("marker.js"),
            tools=tools,
            megabytes=work.MEGABYTES,
            megapixels=work.MEGAPIXELS,
        )

    def _connect(self) -> None:
        kind = "caption" if self.captions else "mask"
        sources = (
            [self.marker, self.caption, self.category]
            if self.captions
            else [self.marker, self.photograph, self.mask]
        )
        emptied = [self.marker] if self.captions else [self.marker, self.photograph, self.mask]
        self.add.click(
            self.take_example,
            [self.examples, *sources],
            [self.examples, self.shown, *emptied],
            api_name=f"add_{kind}_example",
        )
        self.shown.remove(
            self.remove_example,
            [self.examples],
            [self.examples, self.shown],
            api_visibility="private",
        )
        running = self.run.click(
            self.search,
            [self.examples, self.queries, self.category, *([] if self.captions else [self.closer])],
            [self.results],
            api_name=f"find_{kind}s",
            concurrency_id="model",
            show_progress="minimal",
        )
        self.run.click(None, js=_SCROLL)
        self.stop.click(None, cancels=[running])

    def take_example(self, examples: Sequence[Example], *sources: Any) -> tuple[Any, ...]:
        """The examples with a new one, their HTML, and empty inputs; or what is wrong."""
        try:
            more = work.with_example(self.model, examples, self._example(*sources))
        except InputError as error:
            inputs = 1 if self.captions else 3
            return (gr.skip(), cards.examples_page(examples, str(error)), *[gr.skip()] * inputs)
        return (more, cards.examples_page(more), "", *([] if self.captions else [None, None]))

    def _example(self, marked: str | None, *others: Any) -> Example:
        if self.captions:
            caption, category = others
            return work.marked_example(marked, caption or "", category or "")
        photograph, mask = others
        return work.example_of(marked, photograph, mask)

    def remove_example(
        self, examples: Sequence[Example], event: gr.EventData
    ) -> tuple[tuple[Example, ...], str]:
        fewer = tuple(example for place, example in enumerate(examples) if place != event.index)
        return fewer, cards.examples_page(fewer)

    def search(
        self,
        examples: Sequence[Example],
        paths: list[str] | None,
        category: str,
        closer: bool = False,
    ) -> Iterator[str]:
        """The HTML of the results, again after every few photographs."""
        kept, done = work.Kept((category or "").strip() or "object"), []
        total = len(paths or ())
        try:
            name = category if self.named else ""
            for result in work.find(self.model, examples, paths, name, closer, self.captions):
                if isinstance(result, work.Found):
                    kept.add(result)
                done.append(cards.card_of(result) if isinstance(result, work.Found) else result)
                if len(done) % work.BATCH == 0 or len(done) == total:
                    yield cards.results_page(done, kept, total, self.captions)
        except InputError as error:
            yield cards.message(str(error))


_SCROLL = """() => {
  const outcome = [...document.querySelectorAll(".icl-outcome")].find((each) => each.offsetParent);
  if (outcome) outcome.scrollIntoView({behavior: "smooth", block: "nearest"});
}"""

_REMOVE = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-remove]");
  if (button) trigger("remove", {index: Number(button.dataset.remove)});
});
"""


def _head(model: InContextModel, name: str) -> str:
    most = work.capacity(model)
    examples = "one example" if most == 1 else f"up to {most} examples"
    return render("web_head.html.j2", name=name, examples=examples, side=model.image_size)


def _step(number: int, title: str) -> str:
    return f'<h2 class="icl-step">{number} · {title}</h2>'


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
