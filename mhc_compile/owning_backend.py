"""`torch.compile(model, backend=Backend(n=4))`: a backend that converts while it compiles, and owns what it adds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from mhc_compile import _torch
from mhc_compile.backend import ANCHOR, compile_rewritten, compiled_by, normalized, recorded_analysis
from mhc_compile.config import MHCConfig
from mhc_compile.conversion import TREE, SiteTree, plant
from mhc_compile.convert import as_config, recorded, refuse_unfit
from mhc_compile.errors import ConfigError, MHCError, RewriteError, wrong
from mhc_compile.passes.bind import bind_parameters
from mhc_compile.passes.emit import copy_graph
from mhc_compile.passes.history import PassRecord
from mhc_compile.passes.recompute_choice import Recompute
from mhc_compile.passes.rewrite import analyze, rewrite
from mhc_compile.record import KEY, Record
from mhc_compile.site_choice import Choice, Constraints

_OTHER_MODEL = (
    "this Backend serves another model already, or another part of one (a graph break cuts a model in parts): make a "
    "Backend for each model, and compile with fullgraph=True; or convert the model itself with mhc_compile(model)"
)


class Backend:
    """A `torch.compile` backend that turns one model into n-stream mHC while it compiles it.

    ::

        backend = Backend(n=4)
        fast = torch.compile(model, backend=backend)
        fast(inputs)                                  # compiles, and makes the parameters
        optimizer = AdamW([*param_groups(model), {"params": backend.parameters(), "weight_decay": 0.0}])

    The model keeps its class and its state; the mHC parameters belong to the backend, under the names that a converted
    model has (`mhc.<site>.phi`). One backend serves one model, in one graph: what it cannot tell to be that model
    raises. Prefer `mhc_compile(model)` where the model may be changed: a call that goes around the compiled function
    runs the plain model, and DDP does not see the parameters.

    n, config, only, skip, site_constraints, recompute, options: as for `mhc_compile`. Raises ConfigError for an
    illegal one.
    """

    def __init__(
        self,
        n: int | None = None,
        *,
        config: MHCConfig | None = None,
        only: Choice | None = None,
        skip: Choice | None = None,
        site_constraints: Constraints | None = None,
        recompute: Any = None,
        **options: Any,
    ) -> None:
        self.config, self._recompute = as_config(n, config, options), Recompute.of(recompute)
        self.history: list[PassRecord] = []
        self._only, self._skip, self._site_constraints = only, skip, site_constraints
        self._record: Record | None = None
        self._tree: SiteTree | None = None
        self._seen: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()  # of the model, by id

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Dynamo's backend interface."""
        _torch.keep_no_backend(self)
        history: list[PassRecord] = []
        try:
            graph = normalized(gm, history)
            _refuse(graph)
            self._same_model(example_inputs)
            if self._record is None:
                self._convert(graph, example_inputs)
            assert self._record is not None and self._tree is not None
            compiled = self._compile(graph, example_inputs, self._record, self._tree, history)
        except MHCError as error:
            raise _torch.through_dynamo(error) from error
        self.history += history
        return compiled

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (`mhc.<site>.phi`, ...) and parameters. Raises RewriteError before the first compilation."""
        return self._made("named_parameters").named_parameters(prefix=TREE)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The mHC parameters, for an optimizer. Raises RewriteError before the first compilation."""
        return self._made("parameters").parameters()

    def state_dict(self) -> dict[str, Any]:
        """The mHC weights and the record of the conversion, as in the state_dict of a converted model.

        With the model's own they are what `mhc_compile.load` reads: `{**model.state_dict(), **backend.state_dict()}`.
        Raises RewriteError before the first compilation.
        """
        return self._made("state_dict").state_dict(prefix=f"{TREE}.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the mHC weights of a state; other entries are left out.

        Raises RewriteError before the first compilation, and ConfigError when the state is of another conversion or
        lacks weights.
        """
        tree = self._made("load_state_dict")
        own = {key.removeprefix(f"{TREE}."): value for key, value in state.items() if key.startswith(f"{TREE}.")}
        missing = sorted(tree.state_dict().keys() - own.keys())
        if missing:
            found = f"one without {', '.join(f'{TREE}.{key}' for key in missing[:3])}"
            step = "pass the state_dict of a Backend, or of a converted model, with the same sites"
            raise ConfigError(wrong("the state", found, f"the weights of all sites, and {KEY}", step))
        assert self._record is not None
        step = "make a Backend with the options of the one that was saved, or mhc_compile.load(state, the plain model)"
        self._record.function.check_state(state, step=step)
        tree.load_state_dict(own)

    def _made(self, what: str) -> SiteTree:
        if self._tree is None:
            raise RewriteError(
                f"{what}() of a Backend that has compiled nothing yet: its parameters appear with the first call of "
                "the compiled model. Call it once before"
            )
        return self._tree

    def _same_model(self, example_inputs: list[Any]) -> None:
        """One backend serves one model: another one's sites may have the same names."""
        parameters = [value for value in example_inputs if isinstance(value, nn.Parameter)]
        if self._seen and not any(id(parameter) in self._seen for parameter in parameters):
            raise RewriteError(_OTHER_MODEL)
        self._seen.update({id(parameter): parameter for parameter in parameters})

    def _convert(self, graph: fx.GraphModule, example_inputs: list[Any]) -> None:
        """Take down the sites of the first graph, and make their parameters."""
        analysis = analyze(copy_graph(graph), tie_shared=self.config.tie_shared)
        refuse_unfit("the compiled model", analysis)
        record = recorded(analysis, self.config, self._only, self._skip, self._site_constraints)
        device = next((value.device for value in example_inputs if isinstance(value, nn.Parameter)), None)
        self._tree, self._record = plant(record, device), record

    def _compile(
        self,
        graph: fx.GraphModule,
        example_inputs: list[Any],
        record: Record,
        tree: SiteTree,
        history: list[PassRecord],
    ) -> Callable[..., Any]:
        if record.config.n == 1:
            return compiled_by(record.config.backend, graph, example_inputs)
        analysis = recorded_analysis(graph, record)
        look_up, names = bind_parameters(graph, analysis.sites, record.config)
        history += [*analysis.records, *rewrite(analysis, record.config, look_up)]
        added = [tree.get_parameter(name) for name in names]
        fake = _torch.as_fake(example_inputs, added)
        compiled = compile_rewritten(graph, [*example_inputs, *fake], record.config.backend, history, self._recompute)
        trained = [parameter.requires_grad for parameter in added]

        place, own = _first_parameter(example_inputs)
        held = [compiled]
        if own is not None:  # Dynamo keeps `run` for good, as it keeps what any backend of one's own gave
            tracked = _torch.tracked_inputs(graph)
            weakref.finalize(own(), _let_go, held, self.history, history, tracked).atexit = False

        def run(*args: Any) -> Any:
            if own is not None and args[place] is not own():
                raise RewriteError(_OTHER_MODEL)  # Dynamo runs one compilation for all models of a class
            if [parameter.requires_grad for parameter in added] != trained:
                raise RewriteError(
                    "requires_grad of the Backend's parameters changed since this graph was compiled; call "
                    "torch._dynamo.reset() and then the compiled model again"
                )
            return held[0](*args, *added)

        return run


def _let_go(held: list[Any], history: list[PassRecord], own: list[PassRecord], tracked: list[Any]) -> None:
    """The model is gone: drop what was compiled of it, and its records from the history of the backend."""
    held.clear()
    tracked.clear()
    history[:] = [record for record in history if all(record is not one for one in own)]


def _first_parameter(example_inputs: list[Any]) -> tuple[int, Callable[[], Any] | None]:
    """Where the first parameter is among the inputs of a graph, and a weak reference to it."""
    for place, value in enumerate(example_inputs):
        if isinstance(value, nn.Parameter):
            return place, weakref.ref(value)
    return 0, None


def _refuse(graph: fx.GraphModule) -> None:
    if any(True for _ in graph.graph.find_nodes(op="call_function", target=ANCHOR)):
        raise RewriteError("the compiled model is converted already; compile it with a backend of torch's")
    if _torch.active_ddp():
        raise RewriteError(
            "the parameters of a Backend are no parameters of the model that DistributedDataParallel wraps, which "
            "would not average their gradients; convert the model with mhc_compile(model) before wrapping it"
        )
