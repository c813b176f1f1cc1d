"""`torch.compile(model, backend=Backend(n=4))` converts one model while compiling, and owns the mHC parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphs import FAR, assert_same, first_output, fresh, own_parameters, randomize_parameters, result_of
from mhc_compile import Backend, ConfigError, RewriteError, load, mhc_compile, param_groups

SMALL = "parallel"

pytestmark = [
    # transformers calls cached helpers in forward; Dynamo warns that it traces what they wrap
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(name: str, **options: Any) -> tuple[nn.Module, Any, Backend, dict[str, Any]]:
    """A model, its compiled form, the backend, and inputs; called once."""
    model, inputs = fresh(name)
    backend = Backend(4, **{"backend": "eager", **options})
    fast = torch.compile(model, backend=backend)
    fast(**inputs)
    return model, fast, backend, inputs


@pytest.mark.parametrize("name", [SMALL, "gpt2", "vit"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.cases(2)
def test_the_function_is_kept_at_step_0(name: str, inner: str) -> None:
    plain, inputs = fresh(name)
    model, fast, _, _ = compiled(name, backend=inner)
    expected = result_of(lambda: plain(**inputs), own_parameters(plain))
    assert_same(expected, result_of(lambda: fast(**inputs), own_parameters(model)), outputs=1e-5, gradients=1e-4)


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.sweep)])
def test_it_computes_what_a_converted_model_does(inner: str) -> None:
    model, fast, backend, inputs = compiled("gpt2", backend=inner)
    randomize_parameters(backend.parameters())
    twin = load({**model.state_dict(), **backend.state_dict()}, fresh("gpt2")[0])
    expected = first_output(lambda: twin(**inputs))
    assert (first_output(lambda: model(**inputs)) - expected).abs().max() > FAR
    torch.testing.assert_close(first_output(lambda: fast(**inputs)), expected, rtol=1e-5, atol=1e-5)
    for length in (3, 5, 7):  # other shapes share the parameters
        ids = inputs["input_ids"][:, :length]
        torch.testing.assert_close(
            first_output(lambda ids=ids: fast(input_ids=ids)),
            first_output(lambda ids=ids: twin(input_ids=ids)),
            rtol=1e-5,
            atol=1e-5,
        )


def test_it_trains() -> None:
    model, fast, backend, inputs = compiled(SMALL, backend="aot_eager")
    groups = [*param_groups(model), {"params": list(backend.parameters()), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = fast(**inputs).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in backend.named_parameters():
        assert name.startswith("mhc.") and parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_state_goes_to_another_backend() -> None:
    _model, fast, backend, inputs = compiled(SMALL)
    randomize_parameters(backend.parameters())
    expected = first_output(lambda: fast(**inputs))
    other_model, other, other_backend, _ = compiled(SMALL)
    assert not torch.equal(first_output(lambda: other(**inputs)), expected)
    other_backend.load_state_dict({**other_model.state_dict(), **backend.state_dict()})
    assert torch.equal(first_output(lambda: other(**inputs)), expected)


@pytest.mark.parametrize("use", ["parameters", "named_parameters", "state_dict", "load_state_dict"])
def test_uses_before_the_first_compilation_raise(use: str) -> None:
    backend = Backend(4)
    with pytest.raises(RewriteError, match="Call it once before"):
        getattr(backend, use)(*([{}] if use == "load_state_dict" else []))


def test_weights_that_do_not_fit_are_refused() -> None:
    _, fast, backend, inputs = compiled(SMALL)
    expected = first_output(lambda: fast(**inputs))
    state = backend.state_dict()
    without = {key: value for key, value in state.items() if not key.endswith("phi")}
    with pytest.raises(ConfigError, match="phi"):
        backend.load_state_dict(without)
    _, _, other, _ = compiled(SMALL, iterations=3)
    with pytest.raises(ConfigError, match="another conversion"):
        backend.load_state_dict(other.state_dict())
    assert torch.equal(first_output(lambda: fast(**inputs)), expected)


def test_a_second_model_is_refused() -> None:
    """Dynamo would run one compilation for both models of a class, with the mHC parameters of the first."""
    _, _, backend, inputs = compiled(SMALL)
    with pytest.raises(RewriteError, match="another model"):
        torch.compile(fresh(SMALL)[0], backend=backend)(**inputs)
    with pytest.raises(RewriteError, match="another model"):
        torch.compile(fresh("vit")[0], backend=backend)(**fresh("vit")[1])


class Broken(nn.Module):
    """Two residual layers with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return x + torch.tanh(self.second(x))


def test_a_model_in_parts_is_refused() -> None:
    with torch.no_grad(), pytest.raises(RewriteError, match="fullgraph=True"):
        torch.compile(Broken(), backend=Backend(2, backend="eager"))(torch.ones(2, 8))


def test_models_that_cannot_be_converted_are_refused_in_words() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(RewriteError, match="no residual add"):
        torch.compile(nn.Sequential(nn.Linear(8, 8)), backend=Backend(2, backend="eager"))(x)
    with pytest.raises(ConfigError, match="unknown"):
        Backend(4, unknown=3)
    with pytest.raises(ConfigError, match="n is 0"):
        Backend(0)


def test_a_converted_model_keeps_its_own_sites() -> None:
    """The outer compilation steps over a converted model; inside one graph it is refused."""
    model, inputs = fresh(SMALL)
    mhc_compile(model, 4, backend="eager", example_inputs=inputs)
    randomize_parameters(model.mhc.parameters())
    expected = first_output(lambda: model(**inputs))
    backend = Backend(4, backend="eager")
    assert torch.equal(first_output(lambda: torch.compile(model, backend=backend)(**inputs)), expected)
    with pytest.raises(RewriteError, match="compiled nothing yet"):
        backend.parameters()


def test_unfreezing_after_the_compilation_is_not_missed() -> None:
    _, fast, backend, inputs = compiled(SMALL)
    for parameter in backend.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RewriteError, match="requires_grad"):
        fast(**inputs)
    torch._dynamo.reset()
    fast(**inputs).sum().backward()
    assert all(parameter.grad is None for parameter in backend.parameters())


def test_one_stream_adds_no_parameters() -> None:
    model, inputs = fresh(SMALL)
    backend = Backend(1, backend="eager")
    assert torch.equal(torch.compile(model, backend=backend)(**inputs), model(**inputs))
    assert not list(backend.parameters())


def test_partial_conversion() -> None:
    _, _, whole, _ = compiled("llama")
    _, _, part, _ = compiled("llama", skip="*.mlp")
    names = {name.rsplit(".", 1)[0] for name, _ in whole.named_parameters()}
    assert {name.rsplit(".", 1)[0] for name, _ in part.named_parameters()} == {
        name for name in names if not name.endswith("mlp")
    }
