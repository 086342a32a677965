"""Tests that an option is honoured or refused, in every form, right or wrong."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from pi0fm import options
from pi0fm.options import option, required
from pi0fm_client.errors import ConfigError


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = option(1e-3, "peak")
    betas: tuple[float, float] = option((0.9, 0.95), "moments")

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be above 0, found {self.learning_rate}; type --optimizer.learning_rate 0.001")


@dataclass(frozen=True)
class Run:
    output: str = required("folder of the run")
    steps: int = option(100, "optimiser steps")
    tasks: tuple[str, ...] = option((), "task names")
    numbers: tuple[int, ...] = option((), "of episodes")
    resume: bool = option(False, "go on where a run stopped")
    seed: int | None = option(None, "of everything")
    shape: Literal["round", "flat"] = option("round", "of nothing")
    optimizer: Optimizer = option(Optimizer, "AdamW")


@dataclass(frozen=True)
class Zoo:
    animals: dict[str, Run] = option(dict, "NAME -> a run of its own")


ALIASES = {"policy.optimizer_lr": "optimizer.learning_rate"}


def parse(*words: str, **base: object) -> Run:
    return options.parse(Run, words, ALIASES, base)


def test_defaults_stand_when_only_the_required_option_is_given() -> None:
    assert parse("--output", "runs/a") == Run(output="runs/a")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--steps", "7"], Run("x", steps=7)),
        (["--steps=7"], Run("x", steps=7)),
        (["--resume"], Run("x", resume=True)),
        (["--resume", "--steps", "7"], Run("x", steps=7, resume=True)),
        (["--resume", "false"], Run("x")),
        (["--tasks", "[reach-v3, push-v3]"], Run("x", tasks=("reach-v3", "push-v3"))),
        (["--seed", "3"], Run("x", seed=3)),
        (["--seed", "null"], Run("x")),
        (["--optimizer.learning_rate", "5e-1"], Run("x", optimizer=Optimizer(0.5))),
        (["--optimizer.learning-rate", "0.5"], Run("x", optimizer=Optimizer(0.5))),
        (["--policy.optimizer_lr", "0.5"], Run("x", optimizer=Optimizer(0.5))),
        (["--steps", "7", "--steps", "8"], Run("x", steps=8)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_way_to_write_an_option(words: list[str], expected: Run) -> None:
    assert parse("--output", "x", *words) == expected


def test_command_line_wins_over_the_file_and_the_file_over_the_base(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output: file\nsteps: 2\noptimizer:\n  learning_rate: 0.25\n")
    run = parse(str(path), "--steps", "3", output="base", seed=1)
    assert run == Run("file", steps=3, seed=1, optimizer=Optimizer(0.25))


def test_files_in_a_row_are_merged_in_order(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("output: one\nsteps: 1\noptimizer: {learning_rate: 0.25}\n")
    (tmp_path / "two.yaml").write_text("steps: 2\noptimizer: {betas: [0.5, 0.75]}\n")
    row = [str(tmp_path / name) for name in ("one.yaml", "two.yaml")]
    assert parse(*row, "--seed", "1") == Run("one", steps=2, seed=1, optimizer=Optimizer(0.25, (0.5, 0.75)))
    assert parse(*row[::-1]).steps == 1


def test_a_row_names_the_folder_that_none_of_its_files_gives(tmp_path: Path) -> None:
    for name, text in (("one", "steps: 1\n"), ("two", "seed: 2\n"), ("named", "output: here\n")):
        (tmp_path / f"{name}.yaml").write_text(text)

    def output(*names: str) -> str:
        return options.parse(Run, [*(str(tmp_path / f"{name}.yaml") for name in names)], named_by_row="output").output

    assert output("one", "two") == "outputs/one_two"
    assert output("one", "named") == "here"
    with pytest.raises(ConfigError, match="option output is required"):
        output("one")


def test_options_with_another_file_hold_where_it_stands_in_the_row(tmp_path: Path) -> None:
    (tmp_path / "robot.yaml").write_text("output: x\nsteps: 5\nwith:\n  small: {steps: 1}\n")
    (tmp_path / "small.yaml").write_text("seed: 3\n")
    robot, small = str(tmp_path / "robot.yaml"), str(tmp_path / "small.yaml")
    assert parse(small, robot) == Run("x", steps=1, seed=3)
    assert parse(small, robot, "--steps", "9").steps == 9
    with pytest.raises(ConfigError, match=r"robot\.yaml has options with 'small', but no file has that name: "):
        parse(robot)
    for wrong in ("3", "{small: 3}", "[small]"):
        (tmp_path / "robot.yaml").write_text(f"output: x\nwith: {wrong}\n")
        with pytest.raises(ConfigError, match=r"robot\.yaml must have options under with NAME, found "):
            parse(small, robot)


@pytest.mark.parametrize("name", ["pi05", "pi05.yaml", "configs/pi05.yaml"])
def test_a_shipped_file_is_found_by_its_name_in_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert options.find_file(name) == options.shipped()["pi05"]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a: 1\n")
    assert options.find_file(name) == Path(name), "a file that is there comes first"


@pytest.mark.parametrize(("name", "guess"), [("p05", "pi05"), ("liberro.yaml", "libero"), ("configs/quick_start.yaml", "quickstart")])
def test_the_nearest_shipped_file_is_named(name: str, guess: str) -> None:
    with pytest.raises(ConfigError, match=rf"no configuration file at {name}; of the shipped ones, did you mean '{guess}'"):
        options.find_file(name)


def test_a_number_in_a_file_may_be_written_as_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "output: 7\nsteps: '12'\nresume: 'true'\noptimizer: {learning_rate: 1e-2, betas: '0.5, 0.75'}\n"
    )  # 1e-2 is text to YAML
    assert parse(str(path)) == Run("7", steps=12, resume=True, optimizer=Optimizer(0.01, (0.5, 0.75)))


def test_a_range_stands_for_its_numbers() -> None:
    assert parse("--output", "x", "--numbers", "0-3,7,9-9").numbers == (0, 1, 2, 3, 7, 9)


def test_encode_is_the_inverse_of_decode() -> None:
    run = Run("x", steps=9, tasks=("a", "b"), seed=4, optimizer=Optimizer(0.125, (0.5, 0.75)))
    assert options.decode(Run, options.encode(run)) == run


def test_merge_changes_neither_side() -> None:
    base, over = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}
    assert options.merge(base, over) == {"a": {"b": 3, "c": 2}}
    assert (base, over) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stesp", "7"], r"unknown option stesp: did you mean 'steps'\?"),
        (["--optimizer.learning_rat", "1"], r"unknown option optimizer\.learning_rat: did you mean 'optimizer\.learning_rate'\?"),
        (["--zzz", "7"], "^unknown option zzz: --help all lists every option$"),
        (["--steps", "many"], "^option steps must be a whole number, found 'many'$"),
        (["--steps", "1.5"], "^option steps must be a whole number, found 1.5$"),
        (["--steps", "true"], "^option steps must be a whole number, found True$"),
        (["--steps", "null"], "^option steps must be a whole number, found None$"),
        (["--resume", "2"], "^option resume must be true or false, found 2$"),
        (["--seed", "x"], "^option seed must be a whole number, found 'x'$"),
        (["--optimizer.learning_rate", "fast"], "^option optimizer.learning_rate must be a finite number, found 'fast'$"),
        (["--optimizer.learning_rate", ".nan"], "^option optimizer.learning_rate must be a finite number, found nan$"),
        (["--optimizer.learning_rate", "inf"], "^option optimizer.learning_rate must be a finite number, found 'inf'$"),
        (["--optimizer.betas", "0.5"], r"^option optimizer.betas must be 2 values, written \[a, b\] or a,b, found 0.5$"),
        (["--optimizer.betas", "0.5,x"], "^option optimizer.betas must be a finite number, found 'x'$"),
        (["--optimizer.betas", "0-1"], r"^option optimizer.betas must be 2 values, written \[a, b\] or a,b, found '0-1'$"),
        (["--numbers", "3-0,7"], "^option numbers takes ranges like 0-49, the lower number first, found 3-0; correct it"),
        (["--tasks", "{a: 1}"], r"^option tasks must be a list, written \[a, b\] or a,b, found \{'a': 1\}$"),
        (["--shape", "square"], "^option shape must be one of round, flat, found 'square'$"),
        (["--optimizer", "adam"], r"option optimizer is a group: expected options in it, found 'adam'; options here: learning_rate, betas"),
        (["--optimizer.learning_rate", "-1"], "^learning_rate must be above 0, found -1.0; type --optimizer.learning_rate 0.001$"),
        (["steps", "7"], "expected an option like --steps 100, found 'steps'"),
        (["--", "7"], "expected an option like --steps 100, found '--'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_way_to_get_an_option_wrong(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse("--output", "x", *words)
    assert "\n" not in str(caught.value)


def test_one_value_may_stand_first_in_the_place_of_the_file() -> None:
    def positional(*words: str) -> Run:
        return options.parse(Run, words, ALIASES, positional="output")

    assert positional("runs/0123", "--steps", "7") == Run("runs/0123", steps=7)
    assert positional("--output", "x") == Run("x")
    assert positional("first", "--output", "x") == Run("x"), "a later option wins"
    with pytest.raises(ConfigError, match="found 'second'; one output may stand first"):
        positional("first", "second")
    with pytest.raises(ConfigError, match="option output is required"):
        positional("--steps", "7")


def test_a_missing_required_option_is_named() -> None:
    with pytest.raises(ConfigError, match="option output is required: folder of the run"):
        parse()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "not readable YAML"),
        ("- 1", "must hold a mapping of options, found list"),
        ("", "must hold a mapping of options, found NoneType"),
        (None, r"no configuration file at .*run\.yaml; of the shipped ones, "),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        parse(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_describe_lists_every_leaf_with_its_default() -> None:
    assert options.describe(Run) == [
        ("--output", "required", "folder of the run"),
        ("--steps", "100", "optimiser steps"),
        ("--tasks", "()", "task names"),
        ("--numbers", "()", "of episodes"),
        ("--resume", "False", "go on where a run stopped"),
        ("--seed", "None", "of everything"),
        ("--shape", "round", "of nothing"),
        ("--optimizer.learning_rate", "0.001", "peak"),
        ("--optimizer.betas", "(0.9, 0.95)", "moments"),
    ]


def test_groups_under_names_that_the_user_gives() -> None:
    words = "--animals.cat.output 007 --animals.cat.tasks a,b --animals.dog.output y --animals.dog.optimizer.betas 1,2"
    zoo = options.parse(Zoo, words.split())
    assert zoo == Zoo({"cat": Run("007", tasks=("a", "b")), "dog": Run("y", optimizer=Optimizer(betas=(1.0, 2.0)))})
    assert options.decode(Zoo, options.encode(zoo)) == zoo
    assert options.describe(Zoo)[:2] == [
        ("--animals", "{}", "NAME -> a run of its own"),
        ("--animals.NAME.output", "required", "folder of the run"),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--animals.cat.stesp", "7"], r"unknown option animals\.cat\.stesp: did you mean 'animals\.cat\.steps'\?"),
        (
            ["--animals.cat.optimizer.beta", "7"],
            r"unknown option animals\.cat\.optimizer\.beta: did you mean 'animals\.cat\.optimizer\.betas'",
        ),
        (["--animals.cat.steps", "7"], r"option animals\.cat\.output is required"),
        (["--animals.cat", "7"], r"option animals\.cat is a group: expected options in it, found 7; options here: output, "),
        (["--animals", "7"], r"option animals is a group: expected animals\.NAME, found 7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_named_group_is_as_strict(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.parse(Zoo, words)


@pytest.mark.parametrize(("word", "guess"), [("train", "train"), ("trian", "train"), ("eavl", "eval"), ("qqqq", None)])
def test_nearest(word: str, guess: str | None) -> None:
    line = options.nearest(word, ["train", "eval", "serve"])
    assert line.endswith("known: eval, serve, train")
    assert line.startswith(f"did you mean {guess!r}?") if guess else "did you mean" not in line


def test_of_many_words_the_nearest_three_are_named_and_the_place_of_the_others() -> None:
    many = [f"camera_{letter}" for letter in "abcdefgh"] + ["arm", "optimizer.learning_rate"]
    assert options.nearest("camera_z", many, "see the page") == "did you mean 'camera_a', 'camera_b' or 'camera_c'? see the page"
    assert options.nearest("learning_rat", many) == "did you mean 'optimizer.learning_rate'?"
    assert options.nearest("zz", many) == f"known: {', '.join(sorted(many)[:8])} and 2 more"


def test_an_unknown_option_of_any_group_means_the_nearest_that_can_be_typed() -> None:
    for words, near in (
        (["--learning_rate", "1"], "optimizer.learning_rate"),
        (["--policy.optimizer_rl", "1"], "policy.optimizer_lr"),
        (["--optimizer.step", "1"], "steps"),
    ):
        with pytest.raises(ConfigError, match=f"^unknown option {words[0][2:]}: did you mean '{near}'\\? --help all lists every option$"):
            parse("--output", "x", *words)


@dataclass(frozen=True)
class Cameras:
    columns: dict[str, str] = option(dict, "camera -> column")
    place: Path = option(Path("x"), "of pictures")
    model: dict[str, int] = option(dict, "sizes")
    free: dict[str, object] = option(dict, "anything")


def test_a_mapping_that_is_typed_replaces_the_files_and_one_name_changes_it(tmp_path: Path) -> None:
    file = tmp_path / "arm.yaml"
    file.write_text("columns: {base: up, side: side}\n")
    assert options.parse(Cameras, [str(file), "--columns", "{base: front}"]).columns == {"base": "front"}
    assert options.parse(Cameras, [str(file), "--columns.base", "front"]).columns == {"base": "front", "side": "side"}
    (tmp_path / "other.yaml").write_text("columns: {base: front}\n")
    row = [str(file), str(tmp_path / "other.yaml")]
    assert options.parse(Cameras, row).columns == {"base": "front", "side": "side"}, "files are merged leaf by leaf"


def test_a_home_folder_is_found_behind_an_equals_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert options.parse(Cameras, ["--place=~/data"]).place == Path("/home/me/data")
    assert parse("--output=~/runs").output == "/home/me/runs" and parse("--output=~").output == "~"


def test_a_list_that_the_shell_took_apart_is_told_as_that() -> None:
    with pytest.raises(ConfigError, match=r"found '1\]'; put the value of --numbers in quotes"):
        parse("--output", "x", "--numbers=[0,", "1]")


@pytest.mark.parametrize("row", [["bundle", "a.yaml"], ["a.yaml", "bundle"]])
def test_files_may_stand_with_the_value_that_has_no_name(row: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("steps: 7\noutput: another\n")
    assert options.parse(Run, row, positional="output") == Run("bundle", steps=7)


def test_a_folder_in_the_place_of_a_file_says_which_option_takes_it(tmp_path: Path) -> None:
    for mark, typed in (("meta/info.json", "--dataset.root"), ("manifest.json", "--pretrained")):
        folder = tmp_path / mark.split("/")[0]
        (folder / mark).parent.mkdir(parents=True)
        (folder / mark).touch()
        with pytest.raises(ConfigError, match=f"found the folder {folder}; type {typed} {folder}"):
            parse(str(folder))
    (tmp_path / "run.yaml").touch()
    with pytest.raises(ConfigError, match=f"no configuration file at {tmp_path}/rum.yaml: did you mean {tmp_path}/run.yaml"):
        parse(str(tmp_path / "rum.yaml"))


def test_a_key_that_a_file_holds_twice_is_refused_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text, line in (
        ("steps: 1\nsteps: 2\n", "lines 1 and 2 both set 'steps'"),
        ("a:\n  b: 1\n  c: 2\n  b: 1\n", "lines 2 and 4 both set 'b'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=line):
            options.read_yaml(path)
    path.write_text("\ufeffbase: &all {a: 1}\nown: {<<: *all, a: 2}\n")  # a merged key may be overridden; a byte order mark is no key
    assert options.read_yaml(path) == {"base": {"a": 1}, "own": {"a": 2}}
