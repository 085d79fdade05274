"""From the words of a command line to a RunConfig; the only door to Hydra and OmegaConf.

Every word is judged on its own before Hydra composes anything, because Hydra stops at the first mistake. What
is left for Hydra to find is wrong in a yaml file. Nothing here runs, logs or makes a directory, except
:func:`hand_over`, which lets Hydra's own main do what only Hydra can.
"""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import hydra
import yaml  # type: ignore[import-untyped]  # comes with OmegaConf, its stubs do not
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from holdfast import knobs
from holdfast.configs.options import GROUPS, did_you_mean, enum_of, kind_words, kinds, takes_names
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError

__all__ = ["Job", "compose_config", "expand", "hand_over"]

Job = Callable[[RunConfig, Sequence[str]], int]
"""Runs one configuration, made with these overrides; returns the exit code."""

_MAIN, _MODULE, _VERSION = "train", "holdfast.configs", "1.3"


def compose_config(overrides: Sequence[str], config_dir: str | None = None) -> RunConfig:
    """The configuration that ``overrides`` (``KEY=VALUE``, ``GROUP=OPTION``) make of the defaults.

    ``config_dir`` adds the user's own groups and options. Raises: ConfigurationError with all mistakes.
    """
    with _search(config_dir) as search:
        return _to_config(_composed(search.checked(overrides), search))


def expand(overrides: Sequence[str], config_dir: str | None = None, *, with_intervals: bool = False) -> list[list[str]]:
    """One list of overrides per combination of the values that they sweep over, the last one varying fastest.

    ``with_intervals`` leaves out what is swept over an interval, for sweepers that choose their own values.
    Raises: ConfigurationError with all mistakes in any of the combinations.
    """
    with _search(config_dir) as search:
        parsed, problems = search.parse(overrides)
        parsed = [override for override in parsed if not (with_intervals and override.is_interval_sweep())]
        choices = [search.choices(override, problems) for override in parsed]
        every_word = dict.fromkeys(itertools.chain.from_iterable(choices))
        search.check(list(every_word), problems)
        return [list(words) for words in itertools.product(*choices)]


def hand_over(words: Sequence[str], job: Job | None = None) -> int:
    """Let Hydra's own main work on ``words``: help, information, completion, and sweeps by plugins, which run ``job``.

    Returns the exit code; of several jobs in this process the largest.
    """
    codes: list[int] = []

    def task(composed: DictConfig) -> None:
        assert job is not None, "only a sweep runs jobs"
        codes.append(job(_to_config(composed), list(HydraConfig.get().overrides.task)))
        if codes[-1]:
            raise _JobError(f"exit code {codes[-1]}")

    _register()
    hydra_main = hydra.main(version_base=_VERSION, config_path=f"pkg://{_MODULE}", config_name=_MAIN)(task)
    before, sys.argv = sys.argv, ["holdfast", *_as_hydra_has_them(words)]  # Hydra reads them from there only
    try:
        hydra_main()
    except SystemExit as left:
        codes.append(left.code if isinstance(left.code, int) else int(left.code is not None))
    finally:
        sys.argv = before
    return max(codes, default=0)


class _JobError(Exception):
    """Tells Hydra's launchers, which know no exit codes, that a job has failed."""


# -- composing --------------------------------------------------------------------------------------------------------


def _register() -> None:
    ConfigStore.instance().store(name="run_config", node=RunConfig)
    OmegaConf.register_new_resolver("holdfast.root", lambda root: root or str(knobs.home()), replace=True)


@contextmanager
def _search(config_dir: str | None) -> Iterator[_Search]:
    folder = None if config_dir is None else Path(config_dir).absolute()
    if folder is not None and not folder.is_dir():
        raise ConfigurationError(f"--config-dir={config_dir} must be a directory, and {folder} is none")
    _register()
    with hydra.initialize_config_module(_MODULE, version_base=_VERSION, job_name="holdfast"):
        yield _Search(GlobalHydra.instance().config_loader(), folder)


def _composed(overrides: Sequence[str], search: _Search) -> DictConfig:
    try:
        return hydra.compose(_MAIN, overrides=[*search.path, *overrides])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigurationError(_explain(error)) from error


def _to_config(composed: DictConfig) -> RunConfig:
    strangers = [str(key) for key in composed if key not in RunConfig.__dataclass_fields__]
    if strangers:
        raise ConfigurationError([_unknown(key) for key in strangers])
    try:
        return cast(RunConfig, OmegaConf.to_object(composed))
    except OmegaConfBaseException as error:
        raise ConfigurationError(_explain(error)) from error


def _explain(error: BaseException) -> str:
    """One line about what is wrong in a yaml file or an interpolation."""
    chain = (error, error.__cause__, error.__context__)
    cause = next((e for e in chain if isinstance(e, OmegaConfBaseException) and e.full_key), None)
    if cause is None or cause.full_key is None:
        return _line(error)
    key, file = cause.full_key, _file_of(error)
    where = f"{file}.yaml: " if file else ""
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and not isinstance(cause, InterpolationKeyError):
        if file.startswith(f"{key}/"):  # a group of the user's own, whose content Hydra puts below its name
            return f"{where}{key} is not an option; begin the file with '# @package _global_' and name whole sections"
        return where + _unknown(key)
    rule = f" must be {kind_words(key)}" if isinstance(cause, ValidationError) else ""
    return f"{where}{key}{rule}: {_line(cause)}"


def _file_of(error: BaseException) -> str:
    found = re.match(r"In '(.+?)': ", str(error))
    return found[1] if found else ""


def _line(error: BaseException) -> str:
    """The message without Hydra's search path and OmegaConf's types."""
    text = str(error).partition("\nConfig search path:")[0].partition("\n    full_key:")[0]
    return " ".join(text.split())


def _unknown(key: str) -> str:
    near = did_you_mean(key)
    return f"{key} is not an option; " + (f"did you mean {near}?" if near else "see them all with --cfg job")


# -- judging overrides ------------------------------------------------------------------------------------------------


class _Search:
    """What Hydra can find: the package's groups and options, and the user's."""

    def __init__(self, loader: ConfigLoader, folder: Path | None) -> None:
        self._loader = loader
        self.path = [] if folder is None else [f"hydra.searchpath=[{_quoted(f'file://{folder}')}]"]

    def options(self, group: str) -> list[str]:
        """Names of the ready-made options in a group; none if it is no group."""
        return self._loader.get_group_options(group, ObjectType.CONFIG, config_name=_MAIN, overrides=self.path)

    def parse(self, words: Sequence[str]) -> tuple[list[Override], list[str]]:
        """What can be read, and what is wrong with the rest."""
        parser, parsed, problems = OverridesParser.create(), list[Override](), list[str]()
        for word in _as_hydra_has_them(words):
            try:
                parsed.append(parser.parse_override(word))
            except HydraException as error:
                problems.append(f"{word!r} cannot be read: {_syntax(word, error)}")
        return parsed, problems

    def checked(self, words: Sequence[str]) -> list[str]:
        """The words as Hydra takes them. Raises: ConfigurationError with all mistakes."""
        return self.check(words, [])

    def check(self, words: Sequence[str], problems: list[str]) -> list[str]:
        """The same, where ``problems`` are known already."""
        parsed, unreadable = self.parse(words)
        problems = [*problems, *unreadable, *(p for override in parsed for p in self._problems(override))]
        if problems:
            raise ConfigurationError(problems)
        return [cast(str, override.input_line) for override in parsed]

    def choices(self, override: Override, problems: list[str]) -> list[str]:
        """The override once for each value that it sweeps over."""
        if not override.is_sweep_override():
            return [cast(str, override.input_line)]
        if not override.is_discrete_sweep():
            problems.append(f"{override.input_line}: an interval has no end of values; list them, or use range()")
            return []
        swept = override.value()
        key = override.get_key_element()
        values = swept.filter(self.options(key)) if isinstance(swept, Glob) else override.sweep_string_iterator()
        words = [f"{key}={value}" for value in values]
        if not words:
            problems.append(f"{override.input_line} matches nothing; there are {', '.join(self.options(key))}")
        return words

    def _problems(self, override: Override) -> Iterator[str]:
        """What is wrong with one override that can be read."""
        key, word = override.key_or_group, override.input_line
        if not key:
            yield f"{word!r} names no option: write KEY=VALUE or GROUP=OPTION"
        elif override.is_hydra_override():
            yield f"{word}: one run is started without Hydra, so its own options change nothing; leave it out"
        elif override.is_delete():
            yield f"{word}: nothing can be removed; set it to another value or choose another option"
        elif override.is_sweep_override():
            yield f"{word} lists several values: add -m for one run each, or quote a text: '{key}=\"…\"'"
        elif options := self.options(key):
            yield from _group_problems(override, options)
        elif override.is_add() and (key in kinds() or key in GROUPS):
            yield f"{word}: {key} exists; leave out the +"
        else:
            yield from _value_problems(key, override.value())


def _group_problems(override: Override, options: Sequence[str]) -> Iterator[str]:
    group, value = override.key_or_group, override.value()
    if override.package is None and override.is_add() == (group in GROUPS):
        right = f"{group}=…" if group in GROUPS else f"+{group}=…, because the defaults do not name it"
        yield f"{override.input_line}: write {right}"
    for choice in value if isinstance(value, list) else [value]:
        if choice not in options:
            near = difflib.get_close_matches(str(choice), options, n=1)
            hint = f"did you mean {group}={near[0]}?" if near else f"choose one of {', '.join(sorted(options))}"
            yield f"{group}={_shown(choice)} does not exist; {hint}"


def _value_problems(key: str, value: object) -> Iterator[str]:
    """``value`` is what Hydra read: a JSON value."""
    is_section = any(known.startswith(f"{key}.") for known in kinds())
    if is_section and isinstance(value, Mapping):
        for name, below in value.items():
            yield from _value_problems(f"{key}.{name}", below)
    elif not is_section and key not in kinds() and not takes_names(key):
        yield _unknown(key)
    elif not _fits(key, value):
        yield f"{key}={_shown(value)} must be {kind_words(key)}"


def _fits(key: str, value: object) -> bool:
    try:
        OmegaConf.update(OmegaConf.structured(RunConfig), key, value)
    except OmegaConfBaseException:
        return False
    return True


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()


def _syntax(word: str, error: HydraException) -> str:
    key, equals, _ = word.partition("=")
    if not equals:
        near = did_you_mean(word)
        return f"write KEY=VALUE or GROUP=OPTION, for example {near}=…" if near else "write KEY=VALUE or GROUP=OPTION"
    if key in kinds() and kinds()[key] is not str:
        return f"{key} must be {kind_words(key)} ({_line(error)})"
    return f"quote the value, '{key}=\"…\"', if it has other characters than letters and digits ({_line(error)})"


def _as_hydra_has_them(words: Sequence[str]) -> list[str]:
    return [_as_hydra_has_it(part) for word in words for part in _spelled_out(word)]


def _spelled_out(word: str) -> Sequence[str]:
    """``model=package.module:function`` is short for the option of the group and the path."""
    found = _FUNCTION.fullmatch(word)
    return (word,) if found is None else ("model=module", f'model.path="{found[1]}"')


_FUNCTION = re.compile(r"model=([A-Za-z_][\w.]*:[A-Za-z_]\w*)")


def _as_hydra_has_it(word: str) -> str:
    """Members of an enum have upper-case names, in whatever case the user writes them. Names that the schema does not
    know are added, with or without a plus."""
    key, equals, text = word.partition("=")
    if equals and takes_names(key.lstrip("+")):
        return f"++{key.lstrip('+')}={text}"
    members = enum_of(key.lstrip("+"))
    names = [name.strip().upper() for name in text.split(",")]
    if members is not None and all(name in members.__members__ for name in names):
        return f"{key}={','.join(names)}"
    return word
