"""A session: examples that are read once, for any number of queries."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from icl_moe.images import ImageLike
from icl_moe.inference.decode import GREEDY, Sampling

if TYPE_CHECKING:
    from icl_moe.inference.model import Decoding, InContextModel

Queries = ImageLike | Iterable[ImageLike]
"""One image, or several. The results of several are a list if they are a list or a tuple, and
otherwise an iterator, which reads no more images at a time than one batch.
"""


class Session:
    """Examples that a model has read; `InContextModel.session` makes one.

    session = model.session([("dog1.jpg", "dog1_mask.png")])
    mask_HW = session.segment("dog2.jpg")
    for drawn in session.draw(Path("photographs").glob("*.jpg")):
        print(drawn.mask_HW.mean(), drawn.confidence_HW)
    """

    def __init__(
        self,
        model: "InContextModel",
        examples: Iterable[Any] | Mapping[str, Iterable[Any]],
        category: str | None = None,
    ) -> None:
        self._model, self._examples, self._category = model, examples, category

    def segment(
        self,
        queries: Queries,
        sampling: Sampling = GREEDY,
        progress: bool = False,
        decoding: "Decoding | None" = None,
        batch: int = 8,
    ) -> Any:
        """The mask of each query, boolean (H, W), in the query's size."""
        return _each(queries, lambda query: self._draw(query, sampling, decoding).mask_HW)

    def draw(
        self,
        queries: Queries,
        sampling: Sampling = GREEDY,
        progress: bool = False,
        decoding: "Decoding | None" = None,
        batch: int = 8,
    ) -> Any:
        """As `segment`, but a `DrawnMask` for each query: with the brightness of each pixel and the
        model's confidence.
        """
        return _each(queries, lambda query: self._draw(query, sampling, decoding))

    def caption(
        self,
        queries: Queries,
        sampling: Sampling = GREEDY,
        progress: bool = False,
        batch: int = 8,
    ) -> Any:
        """The `Region` of each query, with the box in the query's pixels."""
        return _each(
            queries,
            lambda query: self._model.caption(self._examples, query, self._category, sampling),
        )

    def _draw(self, query: ImageLike, sampling: Sampling, decoding: "Decoding | None") -> Any:
        return self._model.draw_mask(
            self._examples, query, self._category, sampling, decoding=decoding
        )


def _each(queries: Queries, answer: Any) -> Any:
    if isinstance(queries, list | tuple):
        return [answer(query) for query in queries]
    if isinstance(queries, Iterator):
        return map(answer, queries)
    return answer(queries)
