import pytest

from distillbev.config import first_difference, read_config, with_overrides, write_config
from distillbev.distill.settings import RelationTermConfig, TermConfig, clean
from distillbev.errors import ConfigError
from distillbev.models.bevdet import BevDetConfig
from distillbev.train.experiment import Experiment, OptimConfig
from distillbev.train.schedule import ScheduleConfig, learning_rate_factor, momentum_at


def test_written_config_reads_back_equal(tmp_path):
    config = OptimConfig(steps=12, schedule=ScheduleConfig(shape="cosine", warmup_share=0.1))
    write_config(config, tmp_path / "optim.yaml")
    assert read_config(tmp_path / "optim.yaml", OptimConfig) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 10\nstepz: 3\n", "stepz"),
        ("steps: ten\n", r"steps"),
        ("steps: 0\n", "choose 1 or more"),
        ("steps: [\n", "not a valid OptimConfig"),
    ],
)
def test_faulty_config_is_refused_with_file_and_key(tmp_path, text, message):
    path = tmp_path / "optim.yaml"
    path.write_text("type: OptimConfig\n" + text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(path, OptimConfig)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_change_nested_settings_only():
    config = with_overrides(OptimConfig(), ["steps=7", "schedule.warmup_share=0.5"])
    assert config.steps == 7
    assert config.schedule.warmup_share == 0.5
    assert config.learning_rate == OptimConfig().learning_rate


def test_overrides_change_entries_of_lists_by_number():
    distill = clean(("stage1", "head"))
    changed = with_overrides(distill, ["taps.1.relation={weight: 2}", "taps.0.foreground.weight=3"])
    assert changed.taps[1].relation == RelationTermConfig(weight=2.0)
    assert changed.taps[0].foreground == TermConfig(weight=3.0)
    assert changed.taps[1].foreground == distill.taps[1].foreground
    with pytest.raises(ConfigError, match=r"no setting 'taps\.2\.relation'"):
        with_overrides(distill, ["taps.2.relation=null"])


@pytest.mark.parametrize("override", ["stepz=7", "schedule.nothing=1", "steps.deep=1"])
def test_override_of_an_unknown_key_names_the_nearest(override):
    with pytest.raises(ConfigError, match=r"no setting .*; the nearest: \w+"):
        with_overrides(OptimConfig(), [override])


@pytest.mark.parametrize("override", ["steps", "steps=[", "steps=many"])
def test_override_that_does_not_fit_is_refused_in_one_line(override):
    with pytest.raises(ConfigError) as caught:
        with_overrides(OptimConfig(), [override])
    assert f"--set {override}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_with_an_exponent_are_numbers_and_names_like_them_stay_text(tmp_path):
    config = with_overrides(Experiment(name="1e5", student=BevDetConfig()), ["optim.learning_rate=1e-3"])
    assert config.optim.learning_rate == 0.001
    write_config(config, tmp_path / "experiment.yaml")
    assert read_config(tmp_path / "experiment.yaml", Experiment) == config


def test_the_first_difference_of_two_configurations_is_named():
    assert first_difference(OptimConfig(), OptimConfig()) is None
    changed = with_overrides(OptimConfig(), ["schedule.warmup_share=0.5"])
    assert first_difference(OptimConfig(), changed) == ("schedule.warmup_share", 0.3, 0.5)


def test_experiment_without_anything_to_train_is_refused():
    with pytest.raises(ConfigError, match="trains nothing"):
        Experiment(name="empty")


def test_one_cycle_rises_to_the_peak_and_falls_to_almost_nothing():
    config = ScheduleConfig(shape="one_cycle", warmup_share=0.3)
    factors = [learning_rate_factor(config, step, 101) for step in range(101)]
    assert factors[30] == pytest.approx(1.0)
    assert factors == sorted(factors[:31]) + sorted(factors[31:], reverse=True)
    assert factors[100] == pytest.approx(config.final_factor)


def test_momentum_falls_while_the_learning_rate_rises_and_comes_back_as_it_falls():
    """In between: half-way up or down a cosine lies half-way."""
    config = ScheduleConfig(warmup_share=0.4, momentum=0.95, peak_momentum=0.85)
    momenta = [momentum_at(config, step, 101) for step in range(101)]
    assert [momenta[step] for step in (0, 20, 40, 70, 100)] == pytest.approx([0.95, 0.9, 0.85, 0.9, 0.95])
    rates = [learning_rate_factor(config, step, 101) for step in range(101)]
    for before, after in ((step, step + 1) for step in range(100)):
        assert (rates[after] > rates[before]) == (momenta[after] < momenta[before])
    constant = ScheduleConfig(shape="step", momentum=0.8)
    assert {momentum_at(constant, step, 11) for step in range(11)} == {0.8}


def test_momentum_outside_its_range_or_without_a_cycle_is_refused():
    with pytest.raises(ConfigError, match=r"peak_momentum=1.0; choose a share"):
        ScheduleConfig(peak_momentum=1.0)
    with pytest.raises(ConfigError, match=r"peak_momentum=0.85 goes with shape='one_cycle', found 'step'"):
        ScheduleConfig(shape="step", peak_momentum=0.85)


def test_step_schedule_divides_by_ten_at_each_milestone():
    config = ScheduleConfig(shape="step", warmup_share=0.0, milestones=(0.5, 0.75))
    factors = [learning_rate_factor(config, step, 101) for step in (0, 49, 50, 75)]
    assert factors == pytest.approx([1, 1, 0.1, 0.01])
