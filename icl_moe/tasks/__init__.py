"""The tasks that examples can show to a model. Each task is one object in one file.

`Task` (task.py) is the interface between a task and the rest of the code. A new task is a subclass
of it, registered here or in another package:

    from icl_moe.tasks import register

    register(MyTask())

docs/add_a_task.md shows an example.
"""

from icl_moe.attributes import Modality, attribute_class
from icl_moe.errors import InputError, nearest
from icl_moe.sequence import SequenceFormat
from icl_moe.tasks.captioning import Captioning
from icl_moe.tasks.segmentation import Segmentation
from icl_moe.tasks.semantic_segmentation import SemanticSegmentation
from icl_moe.tasks.task import Task

SEGMENTATION = Segmentation()
CAPTIONING = Captioning()
SEMANTIC_SEGMENTATION = SemanticSegmentation()

TASKS: dict[str, Task] = {}
"""All tasks by name, in the order of the tables."""


def register(task: Task) -> None:
    """Register a task. Its name must be new."""
    assert task.name not in TASKS, f"the task {task.name} is registered twice"
    TASKS[task.name] = task


def find_task(name: str, where: str) -> Task:
    """The task with this name. Raises InputError, in which `where` says where the name was
    given.
    """
    if name not in TASKS:
        raise InputError(
            f"{where} names the task {name}{nearest(name, TASKS)}; known are {', '.join(TASKS)}."
        )
    return TASKS[name]


def streams(format: SequenceFormat) -> list[int]:
    """The attribute classes that occur in sequences of a format, task by task, each once."""
    inputs: tuple[Modality, ...] = ("text", "image") if format.class_prompt else ("image",)
    found = [
        attribute_class(task.outputs(format), modality, target, format.class_prompt)
        for task in TASKS.values()
        for target, modalities in ((False, inputs), (True, task.outputs(format)))
        for modality in modalities
    ]
    return list(dict.fromkeys(found))


register(SEGMENTATION)
register(CAPTIONING)
register(SEMANTIC_SEGMENTATION)
