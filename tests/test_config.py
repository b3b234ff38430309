"""Configuration files: what is read, what is refused, and what each setting turns into."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pickle
import string
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.config import load_config, read_settings, resolve_balance
from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.loss_weights import plan_loss_weights
from streaming_balance.plan.section import Balancing, parse_balancing
from streaming_balance.plan.strategies import (
    ClassBalanced,
    Downsample,
    EffectiveNumber,
    InstanceBalanced,
    ManualWeights,
    Power,
    Upsample,
)
from streaming_balance.safe_yaml import MAX_BYTES, read_yaml

DOCUMENTED = """
compute: {seed: 42}
data:
  balancing:
    weighted_sampler: {enabled: false, method: inverse_frequency, beta: 0.999,
                       manual_weights: null, replacement: true, num_samples: null}
    downsampling: {enabled: false, target_ratio: 1.0}
    upsampling: {enabled: false, target_ratio: 1.0}
    class_weights: {enabled: false, method: inverse_frequency, beta: 0.999, manual_weights: null,
                    normalize: true}
"""


def write(folder: Path, text: str | bytes) -> Path:
    """Write a configuration file."""
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def balancing_error(folder: Path, section: str) -> str:
    """The message a `data.balancing` section (flow style) is refused with."""
    path = write(folder, f"data: {{balancing: {section}}}")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: data.balancing")
    return message


def test_the_documented_section_is_all_defaults_and_asks_for_natural_order(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, DOCUMENTED))
    assert config.seed == 42
    assert config.balancing == parse_balancing({})
    assert resolve_balance(config) == (InstanceBalanced(), 42)


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "model: {name: unet}", "data: null", "data: x"]
)
def test_a_file_without_the_section_balances_nothing(tmp_path: Path, text: str) -> None:
    config = load_config(write(tmp_path, text))
    assert config.balancing is None
    assert config.seed is None
    assert resolve_balance(str(config.path)) == (InstanceBalanced(), None)


ENABLED = "{upsampling: {enabled: true}}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"balancing: {ENABLED}", "has no data.balancing. It has balancing: "),
        (f"balance: {ENABLED}\ndata: {{root: x}}", "It has balance: "),
        (f"data: {{balance: {ENABLED}}}", "It has data.balance: "),
        (f"data: {{blancing: {ENABLED}}}", "It has data.blancing: "),
        (f"dat: {{balancing: {ENABLED}}}", "It has dat.balancing: "),
        ("model: {name: unet}", "has no data.balancing."),
        ("", "has no data.balancing."),
        ("data: {balancing: {}}", "enables nothing in data.balancing"),
        ("data: {balancing: {upsampling: {target_ratio: 0.5}}}", "enables nothing"),
    ],
)
@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_file_that_balances_nothing_is_warned_about_with_the_key_it_may_mean(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, said: str, is_loaded: bool
) -> None:
    path = write(tmp_path, text)
    with caplog.at_level(logging.WARNING):
        assert resolve_balance(load_config(path) if is_loaded else path)[0] == InstanceBalanced()
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert said in record.getMessage()
    assert ("It has" in record.getMessage()) is ("It has" in said)


@pytest.mark.parametrize(
    "section",
    [
        ENABLED,
        "{class_weights: {enabled: true}}",
        "{strategy: natural}",
        "{weighted_sampler: {enabled: true}}",
    ],
)
def test_a_file_that_asks_for_something_is_not_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, section: str
) -> None:
    with caplog.at_level(logging.WARNING):
        resolve_balance(write(tmp_path, f"balance: 1\ndata: {{balancing: {section}}}"))
    assert caplog.records == []


def test_the_rest_of_a_users_file_is_left_alone(tmp_path: Path) -> None:
    text = """
    model: {balancing_act: yes, data: {balancing: nonsense}}
    data: {root: /somewhere, blancing: 3, val: {batch: 4}}
    compute: {seed: 7, devices: [0, 1]}
    """
    config = load_config(write(tmp_path, text))
    assert config.seed == 7
    assert config.balancing is None


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"weighted_sampler": {"enabled": True}}, ClassBalanced()),
        (
            {"weighted_sampler": {"enabled": True, "method": "effective_num", "beta": 0.9}},
            EffectiveNumber(beta=0.9),
        ),
        (
            {
                "weighted_sampler": {
                    "enabled": True,
                    "method": "manual",
                    "manual_weights": {"LGG": 2.8, "HGG": 1},
                }
            },
            ManualWeights(weights={"LGG": 2.8, "HGG": 1.0}),
        ),
        (
            {"weighted_sampler": {"enabled": True, "replacement": False, "num_samples": 100}},
            ClassBalanced(replacement=False, num_samples=100),
        ),
        ({"downsampling": {"enabled": True, "target_ratio": 0.5}}, Downsample(target_ratio=0.5)),
        ({"upsampling": {"enabled": True, "target_ratio": 0.5}}, Upsample(target_ratio=0.5)),
        ({"strategy": {"name": "power", "alpha": 0.25}}, Power(alpha=0.25)),
        ({"class_weights": {"enabled": True}}, InstanceBalanced()),
    ],
)
def test_each_section_becomes_the_strategy_with_the_same_shares(
    section: dict[str, object], expected: object
) -> None:
    assert resolve_balance(section) == (expected, None)


def test_every_way_to_say_balance_leads_to_the_same_strategy(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {balancing: {strategy: {name: power, alpha: 0.25}}}")
    ways = [str(path), path, load_config(path), {"name": "power", "alpha": 0.25}, Power(alpha=0.25)]
    assert {resolve_balance(way) for way in ways} == {(Power(alpha=0.25), None)}
    assert resolve_balance("power") == (Power(), None)
    assert resolve_balance(None) == (InstanceBalanced(), None)


def test_a_value_that_says_no_balance_at_all_is_refused_with_what_it_may_be() -> None:
    with pytest.raises(ConfigError, match=r"balance is 3; it must be a strategy's name"):
        resolve_balance(3)


def test_when_several_samplings_are_enabled_the_first_in_rank_decides_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    on = {"enabled": True}
    section = parse_balancing({"upsampling": on, "downsampling": on, "weighted_sampler": on})
    with caplog.at_level(logging.WARNING):
        assert section.to_strategy() == ClassBalanced()
    assert (
        "weighted_sampler and downsampling and upsampling; weighted_sampler decides" in caplog.text
    )
    caplog.clear()
    assert parse_balancing({"upsampling": on, "downsampling": on}).to_strategy() == Downsample()
    assert "downsampling decides" in caplog.text


def test_under_strict_two_samplings_are_an_error() -> None:
    on = {"enabled": True}
    section = parse_balancing({"upsampling": on, "downsampling": on, "strict": True})
    with pytest.raises(ConfigError, match="downsampling and upsampling under strict: true"):
        section.to_strategy()


def test_class_weights_beside_a_sampling_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    on = {"enabled": True}
    section = parse_balancing({"class_weights": on, "upsampling": on, "strict": True})
    assert section.to_strategy() == Upsample()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{weighted_sampeler: {}}", "no key 'weighted_sampeler'"),
        ("{weighted_sampeler: {}}", "Did you mean 'weighted_sampler'?"),
        ("{upsampling: {target_ration: 1}}", "Did you mean 'target_ratio'?"),
        ("[1]", "data.balancing is [1]; it must be a mapping"),
        ("{upsampling: on}", "data.balancing.upsampling is 'on'; it must be a mapping"),
        ("{upsampling: {enabled: yes}}", "upsampling.enabled is 'yes'; use true or false"),
        ("{upsampling: {enabled: 1}}", "upsampling.enabled is 1; use true or false"),
        ("{strict: 1}", "data.balancing.strict is 1"),
        ("{strategy: {name: pover}}", "data.balancing.strategy: "),
        ("{strategy: {name: pover}}", "Did you mean 'power'?"),
        ("{strategy: {name: power, alhpa: 1}}", "Did you mean 'alpha'?"),
        ("{weighted_sampler: {method: effective_number}}", "Did you mean 'effective_num'?"),
        ("{weighted_sampler: {method: [1]}}", "method is [1]"),
        ("{weighted_sampler: {replacement: 'no'}}", "replacement is 'no'"),
        ("{weighted_sampler: {enabled: true, method: manual}}", "manual_weights is null"),
        ("{class_weights: {enabled: true, method: manual}}", "such as {LGG: 2.8, HGG: 1}"),
        ("{class_weights: {method: effective_number}}", "Did you mean 'effective_num'?"),
        ("{class_weights: {method: null}}", "class_weights.method is None; allowed: 'inverse_freq"),
        ("{class_weights: {normalise: true}}", "Did you mean 'normalize'?"),
        ("{class_weights: {enabled: on}}", "class_weights.enabled is 'on'; use true or false"),
        ("{class_weights: {basis: sample}}", "class_weights.basis is 'sample'; allowed: 'natural'"),
        ("{class_weights: {basis: sample}}", "Did you mean 'sampled'?"),
        ("{class_weights: {basis: null}}", "class_weights.basis is None; allowed"),
        (
            "{class_weights: {method: manual, manual_weights: {LGG: 2}, basis: sampled}}",
            "method: manual takes the weights as they are written; leave basis out",
        ),
        ("{downsampling: {enabled: null}}", "downsampling.enabled is None; use true or false"),
        ("{downsampling: {ratio: 1}}", "it has enabled, target_ratio"),
        ("{class_weights: {normalize: 1}}", "class_weights.normalize is 1"),
    ],
)
def test_a_wrong_key_or_kind_of_value_is_named_with_the_way_out(
    tmp_path: Path, section: str, expected: str
) -> None:
    assert expected in balancing_error(tmp_path, section)


@pytest.mark.parametrize("resampling", ["upsampling", "downsampling"])
@pytest.mark.parametrize("ratio", ["0", "-0.5", ".nan", ".inf", "1.01", "'1e-4'", "true", "null"])
def test_a_target_ratio_outside_0_to_1_is_refused(
    tmp_path: Path, resampling: str, ratio: str
) -> None:
    message = balancing_error(tmp_path, f"{{{resampling}: {{target_ratio: {ratio}}}}}")
    assert f"data.balancing.{resampling}.target_ratio is" in message
    assert "(0, 1]" in message


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("[1, 2, 3]", "3 entries for "),
        ("[1]", "1 entries for "),
        ("[1, 2]", "boost the majority in silence. Write a mapping: {HGG: 1.0, LGG: 1.0}"),
        ("{LGG: 1}", "leaves out 'HGG'"),
        ("{LGG: 1, HGG: 1, hgg: 1}", "'hgg'"),
    ],
)
@pytest.mark.parametrize("section", ["weighted_sampler", "class_weights"])
def test_manual_weights_that_do_not_fit_the_label_table_are_refused(
    tmp_path: Path, section: str, weights: str, said: str
) -> None:
    path = write(
        tmp_path,
        f"data: {{balancing: {{{section}: "
        f"{{enabled: true, method: manual, manual_weights: {weights}}}}}}}",
    )
    settings = read_settings(path)
    with pytest.raises(ConfigError) as caught:
        plan_loss_weights(
            BalancedPlan.from_labels(
                ["LGG", "HGG"], global_batch_size=2, balance=settings.strategy
            ),
            settings.class_weights,
        )
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["brats.yaml", "diffusion.yaml"])
def test_the_examples_are_files_that_load(project_root: Path, name: str) -> None:
    config = load_config(project_root / "examples" / name)
    assert config.seed == 42
    assert config.balancing is not None
    assert not config.balancing.is_idle


def test_the_example_for_brats_has_every_key_and_the_defaults_but_one(project_root: Path) -> None:
    path = project_root / "examples" / "brats.yaml"
    document = read_yaml(path.read_text(), place="brats.yaml")
    assert isinstance(document, dict)
    section = document["data"]["balancing"]
    defaults = dataclasses.asdict(Balancing())
    defaults["weighted_sampler"]["enabled"] = True
    assert section == defaults


def test_a_loaded_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, DOCUMENTED))
    assert config.balancing is not None
    for value, field in (
        (config, "seed"),
        (config.balancing, "strict"),
        (config.balancing.class_weights, "method"),
        (config.balancing.upsampling, "target_ratio"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 1)


def test_what_is_in_force_is_the_winner_and_the_weights_of_the_loss() -> None:
    on = {"enabled": True}
    everything = {"upsampling": on, "weighted_sampler": on, "class_weights": on}
    assert read_settings(everything).active == (
        "weighted_sampler",
        "class_weights (inverse_frequency, basis natural)",
    )
    assert read_settings({}).active == ("no sampling",)
    assert read_settings(None).active == ("instance_balanced",)
    assert read_settings({"name": "uniform"}).active == ("class_balanced",)
    assert read_settings({"strategy": "power"}).active == ("strategy",)


def test_the_weights_of_the_loss_come_along_with_every_way_to_name_a_section(
    tmp_path: Path,
) -> None:
    section = {"class_weights": {"enabled": True, "basis": "sampled"}}
    path = write(tmp_path, "data: {balancing: {class_weights: {enabled: true, basis: sampled}}}")
    for balance in (section, path, str(path), load_config(path), parse_balancing(section)):
        weights = read_settings(balance).class_weights
        assert (weights.enabled, weights.basis) == (True, "sampled")
    for plain in (None, "power", {"name": "power"}, Power()):
        assert not read_settings(plain).class_weights.enabled


def test_1e_minus_4_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {balancing: {upsampling: {target_ratio: 1e-4}}}")
    balancing = load_config(path).balancing
    assert balancing is not None
    assert balancing.upsampling.target_ratio == 0.0001


@pytest.mark.parametrize("section", ["weighted_sampler", "class_weights"])
@pytest.mark.parametrize("beta", ["1", "1.0", "-0.1", ".nan", "'0.9'", "true"])
def test_a_beta_outside_0_to_1_is_refused(tmp_path: Path, section: str, beta: str) -> None:
    message = balancing_error(tmp_path, f"{{{section}: {{beta: {beta}}}}}")
    assert f"data.balancing.{section}.beta is" in message


@pytest.mark.parametrize("section", ["weighted_sampler", "class_weights"])
@pytest.mark.parametrize(
    "weights",
    [
        "[]",
        "{}",
        "3",
        "'1,2'",
        "{LGG: .nan}",
        "{LGG: .inf}",
        "{LGG: -1}",
        "{LGG: 0, HGG: 0}",
        "{LGG: 0}",
        "{LGG: 0, HGG: 1}",
        "{LGG: '2'}",
        "{LGG: true}",
        "[1, -2]",
        "[0, 0]",
    ],
)
def test_weights_that_are_no_positive_numbers_are_refused(
    tmp_path: Path, section: str, weights: str
) -> None:
    message = balancing_error(tmp_path, f"{{{section}: {{manual_weights: {weights}}}}}")
    assert f"data.balancing.{section}.manual_weights" in message


@pytest.mark.parametrize("length", ["0", "-1", "1.5", "true", "'100'", "[1]"])
def test_a_num_samples_that_is_no_positive_integer_is_refused(tmp_path: Path, length: str) -> None:
    message = balancing_error(tmp_path, f"{{weighted_sampler: {{num_samples: {length}}}}}")
    assert "data.balancing.weighted_sampler.num_samples is" in message


@pytest.mark.parametrize("seed", ["-1", str(2**64), "1.5", "true", "'42'", ".inf"])
def test_a_seed_that_would_have_to_wrap_or_round_is_refused(tmp_path: Path, seed: str) -> None:
    with pytest.raises(ConfigError, match=r"compute\.seed is .* must be an integer from 0"):
        load_config(write(tmp_path, f"compute: {{seed: {seed}}}"))


def test_the_largest_seed_is_kept_exactly(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, f"compute: {{seed: {2**64 - 1}}}")).seed == 2**64 - 1


@pytest.mark.parametrize(
    "text",
    [
        "data: {val: {balancing: {upsampling: {enabled: true}}}}",
        "data: {Validation: {balancing: {}}}",
        "validation: {balancing: null}",
        "test: {balancing: {strategy: power}}",
    ],
)
def test_validation_is_never_balanced(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="asks to balance validation data, which is never done"):
        load_config(write(tmp_path, text))


def test_labels_stay_the_text_they_are() -> None:
    text = "[NO, yes, on, Off, y, 007, 12:30, 1_000, 2024-01-01, 0x1F, 0o17, '1', 1.2.3]"
    words = ["NO", "yes", "on", "Off", "y", "007", "12:30", "1_000", "2024-01-01"]
    assert read_yaml(text, place="labels") == [*words, "0x1F", "0o17", "1", "1.2.3"]


def test_numbers_flags_and_nothing_are_what_they_look_like() -> None:
    text = "[1, -2, +3, 0, 1.5, .5, 1., 1e-4, -1.5E+3, true, FALSE, null, ~]"
    values = [1, -2, 3, 0, 1.5, 0.5, 1.0, 0.0001, -1500.0, True, False, None, None]
    assert read_yaml(text, place="numbers") == values


def test_a_label_no_can_be_weighted(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "data: {balancing: {weighted_sampler: {enabled: true, method: manual, "
        "manual_weights: {NO: 2, YES: 1}}}}",
    )
    assert resolve_balance(path)[0] == ManualWeights(weights={"NO": 2.0, "YES": 1.0})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("data: {}\ndata: {}", "line 2: key 'data' stands twice, first on line 1"),
        ("data:\n  balancing: {strict: true, strict: false}", "line 2: key 'strict' stands twice"),
        ("a: &anchor 1", "line 1: anchor &anchor is refused"),
        ("a: 1\nb: *anchor", "line 2: alias *anchor is refused"),
        ("a: !!python/object/apply:os.system ['echo no']", "tag 'tag:yaml.org,2002:python/object"),
        ("a: !!python/name:os.system", "is refused; a configuration holds plain data"),
        ("a: !local 1", "tag '!local' is refused"),
        ("!!map {a: 1}", "is refused; a configuration holds plain data"),
        ("? [a, b]\n: 1", "a key must be plain text or a number"),
        ("a: [1,", "line 1: while parsing a flow node, expected the node content"),
        ("a: 1\n---\nb: 2", "expected a single document in the stream, but found another document"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("a: {" * 100_000, "nested deeper than 64 levels"),
        (b"\xff\xfe\xff", "is not YAML text in UTF-8"),
        (b"a: \xc3\x28", "is not YAML text in UTF-8"),
        ("a: \0", "is not YAML text in UTF-8"),
        ("- 1\n- 2", "holds [1, 2]; a configuration is a mapping"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, complaint: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    levels = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for above, name in zip("abcdefg", "bcdefgh", strict=True):
        levels.append(f"{name}: &{name} [" + ", ".join([f"*{above}"] * 9) + "]")
    with pytest.raises(ConfigError, match="anchor &a is refused"):
        load_config(write(tmp_path, "\n".join(levels)))


def test_a_file_over_a_megabyte_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"larger than {MAX_BYTES} bytes"):
        load_config(write(tmp_path, b"# " + b"x" * MAX_BYTES))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.yaml: No such file"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


@given(st.text(alphabet=string.printable) | st.binary(max_size=200))
def test_any_text_is_read_or_refused_and_nothing_else(content: str | bytes) -> None:
    with contextlib.suppress(ConfigError):
        read_yaml(content, place="fuzz")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    )
)
def test_any_section_of_plain_values_is_a_balancing_or_a_config_error(section: object) -> None:
    for value in (
        section,
        {"weighted_sampler": section},
        {"upsampling": {"target_ratio": section}},
    ):
        with contextlib.suppress(ConfigError):
            parse_balancing(value).to_strategy()


def test_what_a_configuration_holds_cannot_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "data: {balancing: {weighted_sampler: {manual_weights: {LGG: 2.8, HGG: 1}}, "
        "strategy: {name: target, shares: {LGG: 0.5, HGG: 0.5}, strata: [label, site]}}}"
    )
    balancing = load_config(path).balancing
    assert balancing is not None
    sampler, strategy = balancing.weighted_sampler, balancing.strategy
    assert isinstance(strategy, Mapping)
    assert isinstance(sampler.manual_weights, Mapping)
    for frozen_value in (strategy, strategy["shares"], sampler.manual_weights):
        with pytest.raises(TypeError):
            frozen_value["LGG"] = 100.0  # type: ignore[index]
    assert strategy["strata"] == ("label", "site")
    assert hash(balancing) == hash(load_config(path).balancing)
    again = pickle.loads(pickle.dumps(balancing))
    assert again == balancing
