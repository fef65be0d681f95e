"""Moving rows or moving weights under expert parallelism: python benchmarks/expert_parallel.py
[--json FILE]

An expert layer for the gate of each sparse layer, forward and backward on 2, 4 and 8 gloo ranks,
each with its own episode of the paper's lengths, in two ways:

    rows       every row goes to the rank that holds its expert, and back
    weights    the active experts go to every rank, and their gradients back

The benchmark counts the rows that each rank computes and the bytes sent between ranks, which must
equal the formulas of docs/parallelism.md. Neither depends on the machine. The layer is narrow, to
be fast; bytes at the paper's width are computed with the same formulas.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from decoder import SAMPLES, Workload
from measure import Goal, report
from torch import Tensor, nn
from torch import distributed as dist

from icl_moe.batch import TokenBatch
from icl_moe.launcher import free_port
from icl_moe.model import expert_parallel
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder
from icl_moe.model.feed_forward import FeedForward
from icl_moe.settings import to_dict
from icl_moe.training.distributed import process_group

WAYS: dict[str, Callable[..., list[Tensor]]] = {
    "rows": expert_parallel.run_exchanged,
    "weights": expert_parallel.run_gathered,
}
EP_SIZES = (2, 4, 8)
WIDTH, PAPER_WIDTH, PAPER_MICRO_BATCH = 64, 768, 8
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Case:
    """A layer for a task: the episode's rows of each attribute class, and the experts to which its
    gate sends them.
    """

    task: str
    rows_C: tuple[int, ...]
    experts_CK: tuple[tuple[int, ...], ...]

    def routes(self) -> list[tuple[int, int]]:
        """The (expert, rows) of one rank."""
        return [
            (expert, rows)
            for rows, chosen in zip(self.rows_C, self.experts_CK, strict=True)
            for expert in chosen
        ]


@dataclass(frozen=True)
class Count:
    """The counts of one rank: rows computed, bytes sent to other ranks, seconds of forward and
    backward.
    """

    rows: int
    sent: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--ep", type=int, nargs="+", default=EP_SIZES, help="numbers of ranks")
    parser.add_argument("--width", type=int, default=WIDTH)
    options = parser.parse_args()
    experts, cases = layers()
    figures: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "layers": len(cases) // len(SAMPLES),
        "width": options.width,
    }
    goals = []
    for ep_size in options.ep:
        print(f"{ep_size} ranks ...", file=sys.stderr, flush=True)
        counted = on_ranks(ep_size, options.width, experts, cases)
        for task in SAMPLES:
            goals += tabulate(ep_size, task, options.width, experts, cases, counted, figures)
    report(figures, goals, options.json)


def layers() -> tuple[int, list[Case]]:
    """The number of experts in a layer, and every sparse layer of a new model of the paper's size
    on an episode of each task.
    """
    workload = Workload(quick=False, precision="fp32", micro_batch=1)
    with torch.device("meta"):
        model = InContextDecoder(
            DecoderConfig(
                model=to_dict(workload.recipe.model), vocabulary=to_dict(workload.recipe.vocabulary)
            )
        )
    gates = nn.ModuleDict(
        {str(i): model.layers[i].feed_forward.gate for i in workload.recipe.model.sparse_layers}
    ).to_empty(device="cpu")
    for gate in gates.values():
        draw = torch.Generator().manual_seed(gate.layer)
        with torch.no_grad():
            for name, parameter in gate.named_parameters():
                plain = name.endswith("bias"), "norm" in name
                values = torch.zeros(parameter.shape) if plain[0] else torch.ones(parameter.shape)
                parameter.copy_(
                    values if any(plain) else torch.randn(parameter.shape, generator=draw) * 0.02
                )
    cases = []
    for task in SAMPLES:
        batch = workload.batch(task, "packed")
        cases += [
            Case(task, _rows(batch), tuple(map(tuple, gate(batch.routing).experts_CK.tolist())))
            for gate in gates.values()
        ]
    return workload.recipe.model.experts, cases


def _rows(batch: TokenBatch) -> tuple[int, ...]:
    segments = batch.routing.segments
    return tuple(
        sum(rows for index, rows in segments if index == c)
        for c in range(len(batch.routing.classes))
    )


def on_ranks(
    ep_size: int, width: int, experts: int, cases: list[Case]
) -> dict[str, list[list[Count]]]:
    """Way -> the counts of each rank for each case."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    port = free_port()
    ranks = [
        context.Process(target=_serve, args=(rank, ep_size, port, width, experts, cases, queue))
        for rank in range(ep_size)
    ]
    for process in ranks:
        process.start()
    found = dict(queue.get() for _ in ranks)
    for process in ranks:
        process.join()
    return {
        way: [[found[rank][way][i] for rank in range(ep_size)] for i in range(len(cases))]
        for way in WAYS
    }


def _serve(
    rank: int, ep_size: int, port: int, width: int, experts: int, cases: list[Case], queue: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ep_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with process_group():
        torch.manual_seed(0)
        mine = nn.ModuleList(FeedForward(width) for _ in range(experts))[
            rank * experts // ep_size : (rank + 1) * experts // ep_size
        ]
        queue.put(
            (
                rank,
                {
                    way: [_measure(run, case, mine, width) for case in cases]
                    for way, run in WAYS.items()
                },
            )
        )
        dist.barrier()


def _measure(
    run: Callable[..., list[Tensor]], case: Case, mine: nn.ModuleList, width: int
) -> Count:
    routes = [
        (expert, torch.randn(rows, width, requires_grad=True)) for expert, rows in case.routes()
    ]
    counts_RE = expert_parallel.rows_by_rank(
        routes, len(mine), dist.group.WORLD, dist.get_world_size()
    )
    rows = 0

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(inputs[0])

    hooks = [expert.register_forward_pre_hook(count) for expert in mine]
    with _CountedBytes() as counted:
        dist.barrier()
        started = time.perf_counter()
        torch.cat(run(routes, mine, dist.group.WORLD, counts_RE)).sum().backward()
        dist.barrier()
        seconds = time.perf_counter() - started
    for hook in hooks:
        hook.remove()
    return Count(rows, counted.sent, seconds)


class _CountedBytes:
    """Within this context, sums the bytes that this rank sends to other ranks in collectives (a
    broadcast counts once for each of them).
    """

    def __enter__(self) -> "_CountedBytes":
        self.sent = 0
        self._plain = {
            name: getattr(dist, name) for name in ("all_to_all_single", "broadcast", "reduce")
        }
        rank, others = dist.get_rank(), dist.get_world_size() - 1

        def all_to_all(
            out: Tensor, rows: Tensor, received: list[int], sent: list[int], group: Any
        ) -> None:
            self.sent += (sum(sent) - sent[rank]) * rows[:1].nbytes
            self._plain["all_to_all_single"](out, rows, received, sent, group=group)

        def broadcast(x: Tensor, source: int, group: Any) -> None:
            self.sent += x.nbytes * others if rank == source else 0
            self._plain["broadcast"](x, source, group=group)

        def reduce(x: Tensor, target: int, group: Any) -> None:
            self.sent += x.nbytes if rank != target else 0
            self._plain["reduce"](x, target, group=group)

        vars(dist).update(all_to_all_single=all_to_all, broadcast=broadcast, reduce=reduce)
        return self

    def __exit__(self, *_: object) -> None:
        vars(dist).update(self._plain)


def bytes_of_rows(
    case: Case, ep_size: int, experts: int, width: int, size: int = FP32, micro_batch: int = 1
) -> int:
    """4 M b (rows that a rank routes to experts of other ranks), summed over all ranks: sent and
    returned, in forward and backward.
    """
    away = sum(
        rows
        for rank in range(ep_size)
        for expert, rows in case.routes()
        if expert * ep_size // experts != rank
    )
    return 4 * width * size * away * micro_batch


def bytes_of_weights(case: Case, ep_size: int, width: int, size: int = FP32) -> int:
    """2 A (P - 1) (8 M^2 + 5 M) b: each of A active experts goes to P - 1 ranks, and its gradient
    back.
    """
    active = len({expert for chosen in case.experts_CK for expert in chosen})
    return 2 * active * (ep_size - 1) * (8 * width**2 + 5 * width) * size


def busiest(case: Case, ep_size: int, experts: int, best: bool) -> float:
    """Rows of the busiest rank / mean if rows go to experts: with the actual placement of experts,
    or with the best one for this case.
    """
    loads: dict[int, int] = {}
    for expert, rows in case.routes():
        loads[expert] = loads.get(expert, 0) + rows
    held = experts // ep_size
    placements = (
        itertools.product(range(ep_size), repeat=len(loads))
        if best
        else [tuple(expert // held for expert in loads)]
    )
    most = []
    for owners in placements:
        if max(owners.count(rank) for rank in owners) <= held:
            most.append(
                max(
                    sum(
                        rows
                        for rows, owner in zip(loads.values(), owners, strict=True)
                        if owner == rank
                    )
                    for rank in owners
                )
            )
    return min(most) * ep_size / sum(loads.values())


def tabulate(
    ep_size: int,
    task: str,
    width: int,
    experts: int,
    cases: list[Case],
    counted: dict[str, list[list[Count]]],
    figures: dict[str, Any],
) -> list[Goal]:
    """Means over the layers of a task. The script ends if a number of bytes differs from the
    formula.
    """
    chosen = [i for i, case in enumerate(cases) if case.task == task]
    head = f"ep {ep_size}, {task}"
    work = {}
    for way, counts in counted.items():
        for i in chosen:
            sent = sum(count.sent for count in counts[i])
            by_rows = way == "rows"
            formula = (
                bytes_of_rows(cases[i], ep_size, experts, width)
                if by_rows
                else bytes_of_weights(cases[i], ep_size, width)
            )
            if sent != formula:
                sys.exit(
                    f"{head}, {way}: {sent} bytes were counted, but the formula gives {formula}."
                )
        rows = [[count.rows for count in counts[i]] for i in chosen]
        work[way] = statistics.mean(max(of_ranks) / statistics.mean(of_ranks) for of_ranks in rows)
        figures[f"{head}, {way}: busiest rank's rows / mean"] = work[way]
        figures[f"{head}, {way}: share of idle ranks"] = statistics.mean(
            of_ranks.count(0) / ep_size for of_ranks in rows
        )
        figures[f"{head}, {way}: MB per layer, counted"] = statistics.mean(
            sum(c.sent for c in counts[i]) / 1e6 for i in chosen
        )
        figures[f"{head}, {way}: s per layer"] = statistics.mean(
            max(count.seconds for count in counts[i]) for i in chosen
        )
    figures[f"{head}, rows, best placement of experts: busiest rank's rows / mean"] = (
        statistics.mean(busiest(cases[i], ep_size, experts, best=True) for i in chosen)
    )
    paper = [(cases[i], ep_size, PAPER_WIDTH) for i in chosen]
    by_rows = statistics.mean(
        bytes_of_rows(case, ep, experts, m, BF16, PAPER_MICRO_BATCH) for case, ep, m in paper
    )
    by_weights = statistics.mean(bytes_of_weights(case, ep, m, BF16) for case, ep, m in paper)
    figures[
        f"{head}, rows: MB per rank and layer at width {PAPER_WIDTH}, bf16, micro-batch "
        f"{PAPER_MICRO_BATCH}, by formula"
    ] = by_rows / ep_size / 1e6
    figures[f"{head}, weights: the same"] = by_weights / ep_size / 1e6
    return [
        Goal(f"{head}, busiest rank's rows / mean, weights", work["weights"], 1.0, at_most=True)
    ]


if __name__ == "__main__":
    main()
