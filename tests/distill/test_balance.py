import copy

import pytest
import torch
from msgspec.structs import replace
from toys import (
    ALL_TERMS,
    LABELLED,
    ToyNetwork,
    ToyTeacher,
    imitation,
    make_batch,
    make_distiller,
    total,
)

from distillbev.boxes import Boxes3D
from distillbev.distill.balance import BalanceConfig, GradientBalance, balance_factors
from distillbev.distill.distiller import Distiller
from distillbev.distill.settings import DistillConfig, FalsePositiveConfig, TapConfig, TermConfig
from distillbev.errors import ConfigError

TAPS = (
    TapConfig(
        foreground=TermConfig(weight=0.5),
        background=TermConfig(weight=2.0),
        false_positive=FalsePositiveConfig(weight=1.0),
    ),
)
BALANCED = DistillConfig(taps=TAPS, balance=BalanceConfig(every=1, smoothing=0.0))


def quadratic(scale: float, at: torch.Tensor) -> torch.Tensor:
    return scale * at.square().sum() / 2  # its gradient is scale * at


def test_a_factor_is_the_own_gradient_over_the_term_s_by_hand() -> None:
    features = torch.tensor([3.0, 4.0], requires_grad=True)
    balance = GradientBalance(["a", "b"], BalanceConfig(every=2, smoothing=0.5))
    balance.train()

    def factors(own: float, a: float, step: int) -> list[float]:
        terms = {"a": quadratic(a, features), "b": quadratic(0.0, features)}
        found = balance({"own": quadratic(own, features)}, terms, [features], step)
        return [float(found[name]) for name in ("a", "b")]

    assert factors(2.0, 0.5, step=0) == [4.0, 0.0]  # norms 10 and 2.5; b has no gradient yet
    assert balance.norms.tolist() == [10.0, 2.5, 0.0]
    assert factors(9.0, 9.0, step=1) == [4.0, 0.0]  # not due
    assert factors(4.0, 1.5, step=2) == [15 / 5, 0.0]  # (10 + 20) / 2 over (2.5 + 7.5) / 2
    balance.eval()
    assert factors(9.0, 9.0, step=4) == [3.0, 0.0]


def test_factors_are_bounded_and_a_term_without_gradient_keeps_its_norm() -> None:
    norms = torch.tensor([0.0, 1e-9, 2.0])
    assert balance_factors(norms, torch.tensor(1.0), 100.0).tolist() == [0.0, 100.0, 0.5]
    features = torch.tensor([1.0], requires_grad=True)
    balance = GradientBalance(["a"], BalanceConfig(every=1, smoothing=0.0)).train()
    for scale in (2.0, 0.0):
        balance({"own": quadratic(1.0, features)}, {"a": quadratic(scale, features)}, [features], 0)
    assert balance.norms.tolist() == [1.0, 2.0]


def test_a_weight_is_a_term_s_pull_as_a_share_of_the_student_s_own() -> None:
    distiller = make_distiller(BALANCED).train()
    losses = distiller(make_batch(LABELLED), step=0)
    norms = distiller.last_gradient_norms()
    for name, weight in BALANCED.weights.items():
        assert norms[name] == pytest.approx(weight * norms["heatmap"], rel=1e-4)
    assert (
        losses["heatmap"]
        == make_distiller(replace(BALANCED, balance=None)).train()(make_batch(LABELLED))["heatmap"]
    )


def test_what_multiplies_a_term_cancels() -> None:
    means, sums = (
        make_distiller(replace(BALANCED, reduction=reduction)).train()(make_batch(LABELLED), step=0)
        for reduction in ("mean", "sum")
    )
    for name in imitation(sums):
        torch.testing.assert_close(sums[name], means[name], rtol=1e-4, atol=0)


def test_measuring_changes_no_gradient_beyond_the_factor() -> None:
    balanced, plain = (
        make_distiller(BALANCED).train(),
        make_distiller(replace(BALANCED, balance=None)).train(),
    )
    losses, expected = balanced(make_batch(LABELLED), step=0), plain(make_batch(LABELLED))
    factors = {name: float((losses[name] / expected[name]).detach()) for name in expected}
    assert factors["heatmap"] == 1 and factors["imitate/head/background"] != 1
    total(losses).backward()
    torch.stack([factors[name] * loss for name, loss in expected.items()]).sum().backward()
    scale = max(parameter.grad.abs().max() for parameter in plain.taps.parameters())
    for ours, theirs in zip(balanced.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(scale))


def test_a_run_that_resumes_weighs_as_the_one_that_went_on() -> None:
    config = replace(BALANCED, balance=BalanceConfig(every=2, smoothing=0.5))

    def steps(distiller: Distiller, first: int, last: int) -> list[dict[str, torch.Tensor]]:
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
        found = []
        for step in range(first, last):
            losses = distiller.train()(make_batch(LABELLED, seed=step), step=step)
            optimizer.zero_grad()
            total(losses).backward()
            optimizer.step()
            found.append({name: loss.detach() for name, loss in losses.items()})
        return found

    whole = make_distiller(config)
    first = steps(whole, 0, 3)
    state = copy.deepcopy(whole.state_dict())
    assert state["balance.norms"].min() > 0
    expected = steps(whole, 3, 6)
    resumed = make_distiller(config)
    resumed.load_state_dict(state)
    assert steps(resumed, 3, 6) == expected
    assert steps(make_distiller(config), 0, 3) == first  # and twice the same from the start


def test_balance_works_on_bf16_maps_frames_without_labels_and_empty_ones() -> None:
    config = DistillConfig(taps=(ALL_TERMS,), balance=BalanceConfig(every=1))
    for boxes in ([Boxes3D.empty(), Boxes3D.empty()], [None, LABELLED[0]]):
        distiller = make_distiller(config).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = distiller(make_batch(boxes), step=0)
        assert all(loss.isfinite() for loss in losses.values())
        total(losses).backward()


def test_balance_needs_a_step_and_a_student_with_a_loss_of_its_own() -> None:
    with pytest.raises(ConfigError, match="step must be given"):
        make_distiller(BALANCED)(make_batch(LABELLED))
    with pytest.raises(ConfigError, match=r"ToyNetwork has no loss\(output, batch\)"):
        Distiller.from_probe(ToyTeacher(8, seed=1), ToyNetwork(4, seed=2), BALANCED, make_batch(LABELLED))
    for settings in ({"every": 0}, {"smoothing": 1.0}, {"max_factor": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            BalanceConfig(**settings)
