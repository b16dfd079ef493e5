"""Recipes compose to checked dataclasses, and back to a file that composes to the same."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from qat_plugin.config.catalogue import groups, recipes, summary
from qat_plugin.config.places import recipes_folder
from qat_plugin.config.typed import config_hash, differences, recipe_text, significant
from qat_plugin.errors import ConfigError
from qat_plugin.policy import Policy
from qat_plugin.scheme import EXAMPLES, Scheme

from .conftest import Compose, jobs_of

NEEDED = {
    **dict.fromkeys(
        ("qat_int4_llama", "qat_int4_lsq", "qat_int3", "qat_int2", "qat_distill"),
        ("model.path=DIR", "data.train=FILE", "data.valid=FILE"),
    ),
    **dict.fromkeys(("qlora_7b", "qlora_70b_one_gpu", "qlora_70b_48gb"), ("model.path=DIR", "data.train=FILE")),
}
NAMES = sorted(path.stem for path in recipes_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_composes_and_its_policy_is_one(name: str, compose: Compose) -> None:
    config = compose(f"recipe={name}", *NEEDED.get(name, ()))
    assert config.name == name
    policy = Policy(config.policy.rules, default=config.policy.default, keep=config.policy.keep)
    assert policy.rules or policy.default or config.policy.auto.enabled


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_what_it_does_gives_costs_and_its_command(name: str) -> None:
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 25
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert header[0] == "# @package _global_"
    assert summary(recipes_folder() / f"{name}.yaml").endswith(".")
    for part in ("# Gives:", "# Costs:", "# Run:   qat "):
        assert any(line.startswith(part) for line in header), part
    assert f"recipe={name}" in "".join(header)


def test_every_option_of_a_group_has_a_line_of_help() -> None:
    for group, options in groups().items():
        if group != "scheme":
            assert [option.name for option in options if not option.summary] == [], group


def test_the_scheme_group_holds_every_documented_scheme_under_its_own_spelling() -> None:
    options = {option.name: yaml.safe_load(option.path.read_text(encoding="utf-8")) for option in groups()["scheme"]}
    assert set(options) == set(EXAMPLES)
    for name, content in options.items():
        assert content == {"scheme": name}
        assert str(Scheme.parse(name)) == name


def test_signature_policy_keeps_the_order_of_its_rules(compose: Compose) -> None:
    rules = compose("recipe=qat_mixed_tiny").policy.rules
    assert list(rules.items()) == [("embedding", "fp16"), ("attention", "w8a8"), ("ffn", "w4a16-g32")]


@pytest.mark.parametrize("spelled", ["policy.rules.ffn=w8a8", "scheme@policy.rules.ffn=w8a8"])
def test_a_rule_can_be_added_or_changed_on_the_command_line(spelled: str, compose: Compose) -> None:
    assert compose("recipe=qat_int8_tiny", spelled).policy.rules == {"ffn": "w8a8"}
    assert compose("recipe=qat_mixed_tiny", spelled).policy.rules["ffn"] == "w8a8"


def test_dots_on_the_command_line_spell_one_pattern(compose: Compose) -> None:
    rules = compose(
        "policy=free", "policy.rules.model.layers.0=w8a8", "policy.rules={*.q_proj: w4a16-g48}"
    ).policy.rules
    assert rules == {"model.layers.0": "w8a8", "*.q_proj": "w4a16-g48"}


def test_a_rule_can_be_deleted_and_a_layer_kept(compose: Compose) -> None:
    policy = compose("policy=mixed", "~policy.rules.attention", "policy.rules.ffn=null", "policy.keep=[lm_head]").policy
    assert policy.rules == {"embedding": "fp16", "ffn": None}
    assert policy.keep == ["lm_head"]


def test_a_recipe_may_choose_a_scheme_from_the_group(compose: Compose, mine: Path) -> None:
    (mine / "own.yaml").write_text("defaults:\n  - /scheme@policy.rules.ffn: w4a8-g32\n  - override /policy: free\n")
    assert compose("--config-dir", str(mine), "recipe=own").policy.rules == {"ffn": "w4a8-g32"}
    changed = compose("--config-dir", str(mine), "recipe=own", "scheme@policy.rules.ffn=w8a8")
    assert changed.policy.rules == {"ffn": "w8a8"}


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(compose: Compose) -> None:
    assert compose().trainer.max_steps == 200
    assert compose("recipe=qat_int4_tiny").optimizer.learning_rate != compose().optimizer.learning_rate
    assert compose("recipe=qat_int4_tiny", "trainer.max_steps=7").trainer.max_steps == 7
    assert compose("recipe=qat_int4_tiny", "policy=int8").policy.default == "w8a8"


def test_paths_mean_the_same_from_any_working_directory(compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()  # else models/x would be a hub's name
    config = compose("recipe=qat_int4_llama", "model.path=models/x", "data.train=t.txt", "data.valid=/v.txt")
    assert config.model.path == str(tmp_path / "models" / "x")
    assert (config.data.train, config.data.valid) == (str(tmp_path / "t.txt"), "/v.txt")


def test_steps_and_fractions_stay_what_they_are(compose: Compose) -> None:
    qat = compose("qat.start=1", "qat.freeze=0.5").qat
    assert isinstance(qat.start, int)
    assert isinstance(qat.freeze, float)


def test_a_sweep_runs_each_point_in_a_folder_of_its_own() -> None:
    jobs = jobs_of("-m", "recipe=ptq_tiny", "policy=int8,int4,mixed")
    assert [job.config.policy.default for job in jobs] == ["w8a8", "w4a16-g32", None]
    assert len({job.folder for job in jobs}) == 3


def test_a_sweep_may_use_globs() -> None:
    assert [job.recipe for job in jobs_of("-m", "recipe=glob(qat_*_tiny)")] == [
        name for name in NAMES if name.startswith("qat_") and name.endswith("_tiny")
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ("recipe=qat_mixed_tiny", "policy.rules.lm_head=w8a8", "~policy.rules.attention", "qat.start=0.25"),
        ("recipe=ptq_tiny", "policy.keep=[first]", "model.seed=3"),
        ("recipe=qat_int4_llama", "model.path=a b", "data.train=x", "name='it: is #1'"),
        (
            "model=custom",
            "model._target_=torch.nn.Linear",
            "+model.in_features=3",
            "optimizer=own",
            "trainer.logger=csv",
        ),
    ],
)
def test_the_resolved_recipe_composes_to_the_same_config(
    argv: tuple[str, ...], compose: Compose, tmp_path: Path
) -> None:
    config = compose(*argv)
    (tmp_path / "recipe.yaml").write_text(recipe_text(config))
    again = compose(f"resume={tmp_path}")
    assert differences(significant(config), significant(again)) == []
    assert list(again.policy.rules) == list(config.policy.rules)
    assert config_hash(again) == config_hash(config)
    assert again.run.dir == str(tmp_path)


def test_the_hash_leaves_out_what_changes_no_result_and_nothing_else(compose: Compose) -> None:
    base = config_hash(compose("recipe=ptq_tiny"))
    assert config_hash(compose("recipe=ptq_tiny", "run.dir=x", "verbose=true")) == base
    for change in ("trainer.seed=1", "policy.default=w8a16", "data.batch_size=2", "qat.start=1", "name=other"):
        assert config_hash(compose("recipe=ptq_tiny", change)) != base


def test_a_user_recipe_stands_beside_the_built_in_ones_and_may_replace_one(compose: Compose, mine: Path) -> None:
    (mine / "my70b.yaml").write_text("# My own.\ntrainer:\n  max_steps: 5\n")
    (mine / "recipe").mkdir()
    (mine / "recipe" / "other.yaml").write_text("# @package _global_\n# The other.\nverbose: true\n")
    (mine / "ptq_tiny.yaml").write_text("# Mine instead.\ntrainer:\n  max_steps: 6\n")
    (mine / "policy").mkdir()
    (mine / "policy" / "house.yaml").write_text("# Ours.\ndefault: w4a8-g32\n")
    where = ("--config-dir", str(mine))
    assert compose(*where, "recipe=my70b").trainer.max_steps == 5
    assert compose(*where, "recipe=other").verbose
    assert compose(*where, "recipe=ptq_tiny").trainer.max_steps == 6
    assert compose(*where, "recipe=qat_int4_tiny", "policy=house").policy.default == "w4a8-g32"
    listed = {entry.name: entry.summary for entry in recipes([mine])}
    assert listed["my70b"] == "My own."
    assert listed["ptq_tiny"] == "Mine instead."
    assert "qat_int4_tiny" in listed


def test_a_users_folder_does_not_replace_hydras_own_options(compose: Compose, mine: Path) -> None:
    (mine / "hydra" / "launcher").mkdir(parents=True)
    (mine / "hydra" / "launcher" / "basic.yaml").write_text("_target_: os.system\n")
    (mine / "hydra" / "job_logging").mkdir()
    (mine / "hydra" / "job_logging" / "none.yaml").write_text("handlers:\n  x:\n    (): os.system\n")
    compose("--config-dir", str(mine))
    assert [job.config.trainer.seed for job in jobs_of("--config-dir", str(mine), "-m", "trainer.seed=1,2")] == [1, 2]


def test_a_users_config_yaml_is_no_root(compose: Compose, mine: Path) -> None:
    (mine / "config.yaml").write_text("nonsense: 1\n")
    assert compose("--config-dir", str(mine)).trainer.max_steps == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hydra:\n  callbacks:\n    x:\n      _target_: os.system\n", "configures Hydra itself"),
        ("defaults:\n  - override /hydra/launcher: basic\n", "configures Hydra itself"),
        ("defaults:\n  - /hydra/callbacks@hydra.callbacks.x: y\n", "configures Hydra itself"),
        ("allow: [os]\n", "command line only"),
        ("a: [1\n", "cannot be read as YAML"),
        ("- 1\n", "no recipe"),
        ("trainer:\n  max_stpes: 3\n", "unknown key 'trainer.max_stpes'. Did you mean 'max_steps'?"),
        ("polcy: {}\n", "unknown key 'polcy'. Did you mean 'policy'?"),
        ("trainer:\n  max_steps: many\n", "trainer.max_steps"),
    ],
)
def test_what_a_recipe_may_not_hold(text: str, said: str, compose: Compose, mine: Path) -> None:
    (mine / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose("--config-dir", str(mine), "recipe=bad")
    assert said in str(caught.value)
    assert "bad" in str(caught.value)


def test_every_field_of_the_schema_is_documented(compose: Compose) -> None:
    from qat_plugin.config.keys import keys_with_help

    help = {key: text for key, _, text in keys_with_help()}
    assert set(asdict(compose())["trainer"]) == {key.split(".")[1] for key in help if key.startswith("trainer.")}
    assert all(help.values())


def test_the_methods_of_the_command_are_those_of_the_room() -> None:
    from qat_plugin.config.schema import PTQ_METHODS
    from qat_plugin.ptq import METHODS

    assert tuple(METHODS) == PTQ_METHODS
