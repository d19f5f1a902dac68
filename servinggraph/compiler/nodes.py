"""Makes steps and routers from node definitions, and checks that tensors meet.

Works from the inputs towards the answer: a node is made, asked for its signature, and held
against what reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from servinggraph.compiler.labels import declared_outputs
from servinggraph.compiler.nested import NestedGraph
from servinggraph.compiler.options import validated
from servinggraph.compiler.sequences import keeper
from servinggraph.errors import GraphInvalid, Problem, nearest
from servinggraph.importing import ImportProblem
from servinggraph.interfaces import BatchPolicy, Router, Step, Tensors
from servinggraph.plan import PlanNode
from servinggraph.policies import Guards
from servinggraph.registry import kinds, load_kind
from servinggraph.spec import NodeSpec, Source
from servinggraph.spec.model import COMMON_KEYS, name_problem
from servinggraph.spec.source import KeyPath
from servinggraph.tensors import Signature, TensorSpec

__all__ = ["NodeCompiler", "Tensors", "lone_node"]


@dataclass
class NodeCompiler:
    """Compiles nodes one after the other, collecting problems.

    Attributes:
        source: the definition, for lines and relative paths.
        replace: node or branch name to a callable that stands in for it.
        problems: everything found so far.
        sequences: True when the graph declares `sequences`.
        nested: compiles a graph that is a node of this one: its file, as it is and as it was given, and the node's name.
    """

    source: Source
    replace: Mapping[str, Callable[..., Any]]
    problems: list[Problem]
    sequences: bool = False
    nested: Callable[[Path, str, str], NestedGraph] | None = None

    def node(self, name: str, spec: NodeSpec, path: KeyPath, sources: tuple[str, ...], given: Tensors) -> PlanNode | None:
        """Compile a node.

        Args:
            name: full name, `score.gbm` for a branch.
            spec: its definition.
            path: its key path in the source.
            sources: nodes that it follows.
            given: tensors that reach it.

        Returns:
            The node, or None when problems were found with it.
        """
        found = len(self.problems)
        if name in self.replace:
            spec = _replaced(spec, self.replace[name])
        inside = self._renamed(given, spec, path, name)
        branches: dict[str, PlanNode] = {}
        if (spec.step is None) == (spec.router is None):
            have = "both 'step' and 'router'" if spec.step else "neither 'step' nor 'router'"
            self._report(f"has {have}: a node is one or the other", path, name)
            return None
        work: Step[Any] | Router[Any] | None
        if spec.step is not None:
            work, signature = self._step(name, spec, path)
        else:
            branches = self._branches(name, spec, path, inside)
            work, signature = self._router(name, spec, path, branches)
            branches = _joined(branches, work, spec.batch)
        if work is None or signature is None:
            return None
        nested: NestedGraph | None = None
        if isinstance(work, Step) and work.graph_file is not None:
            nested = self._graph(name, work.graph_file, spec, path)
            if nested is None:
                return None
            signature = nested.signature
        graph = None if nested is None else nested.plan
        inner = branches.values() if graph is None else graph.nodes
        self._check_inputs(signature, inside, path, name)
        self._check_reads(work, inside, path, name)
        self._check_batch(work, spec, signature, path, name)
        lone = lone_node(name, work, inner)
        if lone is not None and (isinstance(spec.batch, BatchPolicy) or spec.batch is True):
            self._report(f"cannot batch: {lone}", (*path, "batch"), name)
        if isinstance(work, Step) and work.unbatchable is not None and spec.batch not in (None, False):
            self._report(f"cannot batch: {work.unbatchable}", (*path, "batch"), name)
        self._check_purity(spec, work, path, name, nested)
        self._check_guards(spec, work, path, name, inner)
        declared = (
            declared_outputs(spec.outputs, self.source, (*path, "outputs"), self.problems, name) if spec.outputs else None
        )
        known = inside if isinstance(work, Step) and work.passes_on else signature.outputs
        outputs = self._outputs(known, declared, spec, given, path, name)
        kind = spec.step or spec.router or ""
        node = PlanNode(
            name=name,
            kind=kind,
            work=work,
            branches=branches,
            sources=sources,
            renamed_inputs=dict(spec.rename.inputs) if spec.rename else {},
            renamed_outputs=dict(spec.rename.outputs) if spec.rename else {},
            keep=tuple(spec.keep) if isinstance(spec.keep, list) else spec.keep,
            timeout_s=_shortest(spec.timeout_ms and spec.timeout_ms / 1e3, None if graph is None else graph.timeout_s),
            batch=spec.batch if spec.batch is not None or graph is None else graph.batch,
            cache=spec.cache if spec.cache is not None or graph is None else graph.cache,
            guards=spec.guards,
            outputs=declared,
            signature=Signature(signature.inputs, outputs),
            streams=isinstance(work, Step) and work.streams,
            graph=graph,
        )
        return None if len(self.problems) > found else node

    def _report(self, message: str, path: KeyPath, node: str) -> None:
        self.problems.append(self.source.problem(message, path, node))

    def _check_guards(
        self, spec: NodeSpec, work: Step[Any] | Router[Any], path: KeyPath, name: str, inner: Iterable[PlanNode]
    ) -> None:
        """Report guards on a node that they cannot stand around."""
        given = [key for key in Guards.model_fields if getattr(spec, key) is not None]
        if not given:
            return
        if isinstance(work, Step) and work.streams:
            text = f"'{given[0]}' is for nodes with one answer, and this one is a generator: put it on the nodes around"
            self._report(text, (*path, given[0]), name)
        elif spec.retry is not None and isinstance(work, Step) and (work.keeps_state or any(map(keeper, inner))):
            text = "'retry' would run a step twice whose state may have changed the first time: catch the failure in the step"
            self._report(text, (*path, "retry"), name)

    def _kind(self, group: str, kind: str, path: KeyPath, name: str) -> Any:
        known = kinds(group)
        if kind not in known:
            self._report(f"unknown {path[-1]} '{kind}'{nearest(kind, list(known))}", path, name)
            return None
        try:
            return load_kind(group, kind)
        except ImportProblem as error:
            self._report(f"{path[-1]} '{kind}' cannot be used: {error}", path, name)
            return None

    def _options(self, kind: Any, spec: NodeSpec, path: KeyPath, name: str) -> Any:
        return validated(kind.options_type, spec.extra, self.source, path, self.problems, node=name, other_keys=COMMON_KEYS)

    def _step(self, name: str, spec: NodeSpec, path: KeyPath) -> tuple[Step[Any] | None, Signature | None]:
        if spec.branches is not None:
            self._report("a step has no 'branches'; only a router has", (*path, "branches"), name)
        kind = self._kind("steps", spec.step or "", (*path, "step"), name)
        options = None if kind is None else self._options(kind, spec, path, name)
        if options is None:
            return None, None
        step: Step[Any] = kind(name, options, self.source.base)
        step.in_sequences = self.sequences
        step.conceal = partial(self.source.expansion.conceal, path=path)
        if spec.outputs is not None:
            step.declared_outputs = {tensor: model.spec() for tensor, model in spec.outputs.items()}
        try:
            return step, step.prepare()
        except GraphInvalid as error:
            for problem in error.problems:
                # A step names the option at fault, if one is, as the first part of `node`.
                self._report(problem.message, (*path, problem.node) if problem.node else path, name)
            return None, None

    def _graph(self, name: str, file: Path, spec: NodeSpec, path: KeyPath) -> NestedGraph | None:
        """Compile the graph that a node stands for; its problems join this one's."""
        assert self.nested is not None  # a bare model has no graph in it
        shown = str(spec.extra["path"])
        if self.source.file is not None:
            shown = str(Path(self.source.file).parent / shown)
        try:
            return self.nested(file, shown, name)
        except GraphInvalid as error:
            self.problems.extend(
                # What is wrong with the node itself has no file yet.
                problem if problem.file is not None else self.source.problem(problem.message, (*path, "path"), name)
                for problem in error.problems
            )
            return None

    def _branches(self, name: str, spec: NodeSpec, path: KeyPath, inside: Tensors) -> dict[str, PlanNode]:
        branches: dict[str, PlanNode] = {}
        if not spec.branches:
            self._report("a router needs 'branches'", path, name)
        reaching = self._reaching(spec)
        before: dict[str, Signature] = {}
        for short, branch in (spec.branches or {}).items():
            place = (*path, "branches", short)
            if reason := name_problem(short, "branch"):
                self._report(reason, place, f"{name}.{short}")
            if branch.after is not None:
                self._report("a branch has no 'after': its router decides when it runs", (*place, "after"), f"{name}.{short}")
            node = self.node(f"{name}.{short}", branch, place, (), reaching(short, spec.extra, inside, before))
            before[short] = Signature() if node is None else node.signature
            if node is not None and node.streams:
                text = (
                    "is a generator, and a router takes one value of each branch: put the generator before or behind the router"
                )
                self._report(text, place, f"{name}.{short}")
            elif node is not None:
                branches[short] = node
        return branches

    @staticmethod
    def _reaching(spec: NodeSpec) -> Callable[..., Tensors]:
        """Return what tells the tensors that reach a branch; a kind that is not there is reported elsewhere."""
        reaching: Callable[..., Tensors] = Router.reaching
        if spec.router in kinds("routers"):
            with suppress(ImportProblem):
                reaching = load_kind("routers", spec.router).reaching
        return reaching

    def _router(
        self, name: str, spec: NodeSpec, path: KeyPath, branches: Mapping[str, PlanNode]
    ) -> tuple[Router[Any] | None, Signature | None]:
        kind = self._kind("routers", spec.router or "", (*path, "router"), name)
        options = None if kind is None else self._options(kind, spec, path, name)
        if options is None or len(branches) != len(spec.branches or {}) or not branches:
            return None, None
        router: Router[Any] = kind(name, options, self.source.base)
        router.conceal = partial(self.source.expansion.conceal, path=path)
        try:
            return router, router.signature({short: node.signature for short, node in branches.items()})
        except GraphInvalid as error:
            for problem in error.problems:
                self._report(problem.message, (*path, problem.node) if problem.node else path, name)
            return None, None

    def _renamed(self, given: Tensors, spec: NodeSpec, path: KeyPath, name: str) -> Tensors:
        """Return the tensors that reach a node, by the names that it knows them under."""
        if given is None or spec.rename is None:
            return given
        renames = spec.rename.inputs
        for old in renames:
            if old not in given:
                self._report(
                    f"'rename.inputs' names '{old}', which does not reach this node{nearest(old, list(given))}",
                    (*path, "rename", "inputs", old),
                    name,
                )
        inside: dict[str, TensorSpec] = {}
        for old, tensor in given.items():
            new = renames.get(old, old)
            if new in inside:
                self._report(f"'rename.inputs' makes two tensors '{new}'", (*path, "rename", "inputs"), name)
            inside[new] = tensor
        return inside

    def _check_inputs(self, signature: Signature, inside: Tensors, path: KeyPath, name: str) -> None:
        if signature.inputs is None or inside is None:
            return
        for tensor, expected in signature.inputs.items():
            if tensor not in inside:
                if not expected.optional:
                    spare = [other for other in inside if other not in signature.inputs]
                    hint = f"; 'rename: {{inputs: {{{spare[0]}: {tensor}}}}}' would pass '{spare[0]}'" if spare else ""
                    if tensor == "state" and not self.sequences:
                        hint = "; a parameter 'state' is what is kept for a sequence only where the graph has 'sequences: {}'"
                    has = ", ".join(sorted(inside)) or "nothing"
                    self._report(f"input '{tensor}' is provided by nobody: what reaches the node is {has}{hint}", path, name)
                continue
            reason = inside[tensor].conflict_with(expected)
            if reason:
                self._report(f"input '{tensor}' does not fit: its {reason}", path, name)

    def _check_reads(self, work: Step[Any] | Router[Any], inside: Tensors, path: KeyPath, name: str) -> None:
        """Report tensors by which a router decides and that never reach it: it would take every request for one without."""
        if inside is None or not isinstance(work, Router):
            return
        has = ", ".join(sorted(inside)) or "nothing"
        for tensor in work.reads:
            if tensor not in inside:
                hint = nearest(tensor, list(inside)) if inside else ""
                self._report(f"decides by tensor '{tensor}', which does not reach it: what does is {has}{hint}", path, name)

    def _check_batch(
        self, work: Step[Any] | Router[Any], spec: NodeSpec, signature: Signature, path: KeyPath, name: str
    ) -> None:
        if not isinstance(spec.batch, BatchPolicy) and spec.batch is not True:
            return
        if isinstance(work, Step) and work.streams:
            text = (
                "cannot batch: it is a generator, and a batch has one result for each request; "
                "remove 'batch', which the steps behind it may have"
            )
            self._report(text, (*path, "batch"), name)
        for side, tensors in (("input", signature.inputs), ("output", signature.outputs)):
            for tensor, known in (tensors or {}).items():
                if known.shape is not None and (not known.shape or known.shape[0] != -1):
                    self._report(
                        f"cannot batch: the first axis of {side} '{tensor}' is fixed, its shape is {list(known.shape)}; "
                        "remove 'batch', or export the model with a free first axis",
                        (*path, "batch"),
                        name,
                    )

    def _check_purity(
        self, spec: NodeSpec, work: Step[Any] | Router[Any], path: KeyPath, name: str, nested: NestedGraph | None
    ) -> None:
        if not spec.pure:
            if spec.cache is not None:
                text = "'cache' is for nodes whose answer depends on nothing but their input: promise it with 'pure: true'"
                self._report(text, (*path, "cache"), name)
            return
        reason = _impurity(work)
        if reason is not None:
            self._report(f"is not pure: it {reason}; remove 'pure'", (*path, "pure"), name)
        if nested is not None and nested.impure is not None:
            self._report(f"is not pure: node '{nested.impure}' does not say 'pure: true'", (*path, "pure"), name)
        for short, branch in (spec.branches or {}).items():
            if not branch.pure:
                self._report(f"is not pure: branch '{short}' does not say 'pure: true'", (*path, "pure"), name)

    def _outputs(
        self,
        known: Tensors,
        declared: Tensors,
        spec: NodeSpec,
        given: Tensors,
        path: KeyPath,
        name: str,
    ) -> Tensors:
        """Return the tensors behind a node: its own, renamed, and those that it keeps."""
        own = known
        if declared is not None:
            for tensor, expected in declared.items():
                reason = None
                if known is not None:
                    reason = known[tensor].conflict_with(expected) if tensor in known else "not what the step gives"
                if reason:
                    self._report(f"declared output '{tensor}' does not fit: {reason}", (*path, "outputs", tensor), name)
            own = declared
        renames = spec.rename.outputs if spec.rename else {}
        if own is not None:
            for old in renames:
                if old not in own:
                    text = f"'rename.outputs' names '{old}', which the node does not give{nearest(old, list(own))}"
                    self._report(text, (*path, "rename", "outputs", old), name)
        kept = self._kept(spec, given, path, name)
        if own is None or kept is None:
            return None
        behind = {renames.get(old, old): tensor for old, tensor in own.items()}
        for tensor, value in kept.items():
            if tensor not in behind:
                behind[tensor] = value
            elif spec.keep != "all":
                text = f"'keep' passes '{tensor}', but the node gives a tensor of that name; rename one"
                self._report(text, (*path, "keep"), name)
        return behind

    def _kept(self, spec: NodeSpec, given: Tensors, path: KeyPath, name: str) -> Tensors:
        if spec.keep is None:
            return {}
        if given is None:
            return None
        if spec.keep == "all":
            return given
        for tensor in spec.keep:
            if tensor not in given:
                text = f"'keep' names '{tensor}', which does not reach this node{nearest(tensor, list(given))}"
                self._report(text, (*path, "keep"), name)
        return {tensor: given[tensor] for tensor in spec.keep if tensor in given}


def _joined(branches: dict[str, PlanNode], router: Router[Any] | None, batch: BatchPolicy | bool | None) -> dict[str, PlanNode]:
    """Return branches of which those without a word on batching rely on the queue in front of their router, if it has one."""
    policy = BatchPolicy() if batch is True else batch or None
    if router is None or policy is None or not router.keeps_rows:
        return branches
    return {
        short: replace(node, joined=policy)
        if isinstance(node.work, Step) and node.work.batches_by_itself and node.work.unbatchable is None and node.batch is None
        else node
        for short, node in branches.items()
    }


def lone_node(name: str, work: Step[Any] | Router[Any], inner: Iterable[PlanNode]) -> str | None:
    """Say which node, this one or one inside it, has to see each request by itself, and why; None without one."""
    if isinstance(work, Router) and work.decides_by_request:
        return f"router '{name}' decides for each request, and joined ones cannot be told apart; batch the nodes behind it"
    if isinstance(work, Step) and work.sees_requests:
        return f"step '{name}' writes each request by itself, and joined ones cannot be told apart; batch the nodes around it"
    inside = (lone_node(node.name, node.work, node.inside) for node in inner)
    return next((found for found in inside if found is not None), None)


def _shortest(*limits: float | None) -> float | None:
    return min((seconds for seconds in limits if seconds is not None), default=None)


def _impurity(work: Step[Any] | Router[Any]) -> str | None:
    if isinstance(work, Step):
        if work.streams:
            return "gives any number of answers, as it is a generator"
        if work.keeps_state:
            return "keeps state for its sequence"
    elif work.settings():
        return "has settings that can be changed while it serves"
    return work.impurity()


def _replaced(spec: NodeSpec, call: Callable[..., Any]) -> NodeSpec:
    """Return the definition of a node with `call` in place of what it did."""
    common = {key: getattr(spec, key) for key in ("after", "rename", "keep", "outputs", "timeout_ms")}
    return NodeSpec.model_validate({**common, "step": "python", "call": call})
