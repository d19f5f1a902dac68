"""The shape of the graph: predecessors, order, cycles, and nodes that lead nowhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from servinggraph.errors import Problem, nearest
from servinggraph.plan import INPUTS
from servinggraph.spec import GraphSpec
from servinggraph.spec.source import Source

__all__ = ["ordered", "sources_of", "stream_problems"]


def sources_of(spec: GraphSpec, source: Source, problems: list[Problem]) -> dict[str, tuple[str, ...]]:
    """Return each node's predecessors: what `after` says, else the node above."""
    result: dict[str, tuple[str, ...]] = {}
    previous = INPUTS
    for name, node in spec.nodes.items():
        named = node.predecessors
        if named is not None and not named:
            problems.append(source.problem("'after' is empty: name nodes, or 'inputs'", ("nodes", name, "after"), name))
        after = (previous,) if not named else tuple(dict.fromkeys(named))
        known = [predecessor for predecessor in after if predecessor == INPUTS or predecessor in spec.nodes]
        for predecessor in after:
            if predecessor not in known:
                hint = nearest(predecessor, [INPUTS, *(other for other in spec.nodes if other != name)])
                problems.append(
                    source.problem(f"'after' names '{predecessor}', which is no node{hint}", ("nodes", name, "after"), name)
                )
        result[name] = tuple(known)
        previous = name
    return result


def ordered(sources: Mapping[str, tuple[str, ...]], spec: GraphSpec, source: Source, problems: list[Problem]) -> list[str]:
    """Return the nodes so that each comes after its sources; reports cycles, dead ends and the answer."""
    cycle = _cycle(sources)
    if cycle:
        path = " -> ".join([*cycle, cycle[0]])
        problems.append(source.problem(f"the graph has a cycle: {path}", ("nodes", cycle[0], "after"), cycle[0]))
    if spec.answer is None and any("'answer'" in problem.message for problem in problems):
        pass  # it is there, but it is no name
    elif spec.answer is None:
        last = next(reversed(spec.nodes), None)
        hint = f": add 'answer: {last}'" if last else ""
        problems.append(source.problem(f"missing key 'answer': which node's result is the answer{hint}", ()))
    elif spec.answer not in spec.nodes:
        hint = nearest(spec.answer, list(spec.nodes))
        problems.append(source.problem(f"'answer' names '{spec.answer}', which is no node{hint}", ("answer",)))
    else:
        _report_unused(sources, spec.answer, source, problems)
    if cycle:
        return []
    order: list[str] = []
    done = {INPUTS}
    waiting = list(sources)
    while waiting:
        ready = [name for name in waiting if all(predecessor in done for predecessor in sources[name])]
        order.extend(ready)
        done.update(ready)
        waiting = [name for name in waiting if name not in done]
    return order


def stream_problems(
    order: Sequence[str], sources: Mapping[str, tuple[str, ...]], streaming: Collection[str], spec: GraphSpec, source: Source
) -> list[Problem]:
    """Return what stands in the way of the graph's generators, which give any number of values.

    Args:
        order: all nodes, each after its sources.
        sources: each node's predecessors.
        streaming: the nodes that are generators.
        spec: the graph.
        source: its definition, for lines.
    """
    problems: list[Problem] = []
    if spec.batch is not None and streaming:
        first = next(name for name in spec.nodes if name in streaming)
        text = (
            f"'batch' joins whole requests, and node '{first}' is a generator, which "
            "gives each any number of answers; give 'batch' to nodes behind it"
        )
        problems.append(source.problem(text, ("batch",)))
    # The generators that each node comes after, itself included, in order.
    behind: dict[str, tuple[str, ...]] = {INPUTS: ()}
    for name in order:
        longest = max((behind[predecessor] for predecessor in sources[name]), key=len, default=())
        for predecessor in sources[name]:
            chain = behind[predecessor]
            if chain != longest[: len(chain)]:
                differ = next((a, b) for a, b in zip(chain, longest, strict=False) if a != b)
                one, other = (generator for generator in spec.nodes if generator in differ)
                text = (
                    f"the streams of '{one}' and '{other}' meet here, and nothing says which of their items belong together: "
                    "let one generator follow the other, or give a single value"
                )
                problems.append(source.problem(text, ("nodes", name, "after"), name))
                break
        behind[name] = (*longest, name) if name in streaming else longest
    return problems


def _cycle(sources: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return one cycle in the direction of the data, beginning with its first node in the file."""
    finished: set[str] = set()
    for start in sources:
        trail: list[str] = []
        on_trail: set[str] = set()
        stack = [(start, iter(sources[start]))] if start not in finished else []
        if stack:
            trail.append(start)
            on_trail.add(start)
        while stack:
            name, rest = stack[-1]
            following = next((predecessor for predecessor in rest if predecessor != INPUTS), None)
            if following is None:
                stack.pop()
                trail.pop()
                on_trail.discard(name)
                finished.add(name)
            elif following in on_trail:
                cycle = trail[trail.index(following) :][::-1]
                names = list(sources)
                first = min(range(len(cycle)), key=lambda index: names.index(cycle[index]))
                return cycle[first:] + cycle[:first]
            elif following not in finished:
                stack.append((following, iter(sources[following])))
                trail.append(following)
                on_trail.add(following)
    return []


def _report_unused(sources: Mapping[str, tuple[str, ...]], answer: str, source: Source, problems: list[Problem]) -> None:
    used: set[str] = set()
    waiting = [answer]
    while waiting:
        name = waiting.pop()
        if name not in used and name != INPUTS:
            used.add(name)
            waiting.extend(sources[name])
    taken = {predecessor for after in sources.values() for predecessor in after}
    for name in sources:
        if name in used:
            continue
        if name in taken:
            text = f"is unreachable from the answer '{answer}': only nodes that lead nowhere use its result"
        else:
            text = f"nobody uses its result: name it in another node's 'after', or answer with it instead of '{answer}'"
        problems.append(source.problem(text, ("nodes", name), name))
