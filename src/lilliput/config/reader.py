"""From layers to settings: the last layer counts most, a recipe lies below all of them, the defaults below that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lilliput.config.aliases import RUN
from lilliput.config.axes import AXES, LOOSE, OPTIONAL, Axis, Choice
from lilliput.config.cutting import uses
from lilliput.config.fields import REQUIRED, Field, fields_of
from lilliput.config.layers import Layer, named
from lilliput.config.settings import Settings
from lilliput.config.shared import top, training
from lilliput.config.single import put
from lilliput.core.registry import is_path, nearest, normal, spelled
from lilliput.wire.codecs import is_built


def settings(*layers: Layer, sweep: bool = False) -> Settings:
    """The settings that these layers give, the last counting most.

    In a `sweep`, what the chosen names do not know is noted instead of refused: another run of it may.
    Raises ValueError that names the setting, the rule and the remedy.
    """
    return Reader(named(layers), sweep).read()


def changed(s: Settings, changes: Layer) -> Settings:
    """The same settings with some typed again."""
    return Reader([*s.typed, *named([changes])], s.sweep).read()


def expanded(*layers: Layer, sweep: bool = False) -> list[Settings]:
    """The same with a recipe below all layers, if they name one: one settings for each row of its table."""
    typed = dict(named(layers))
    if typed.get("recipe") is None:
        return [settings(*layers, sweep=sweep)]
    from lilliput.recipes import find

    recipe = find(str(typed["recipe"]))
    rows = recipe.layers(str(typed.get("scale", "full")))
    wanted = typed.get("case")
    if wanted is not None and wanted not in rows:
        raise ValueError(f"recipe {recipe.name} has no case {wanted!r}; {nearest(str(wanted), rows)}")
    names = rows if wanted is None else [str(wanted)]
    return [settings({**rows[name], "case": name}, *layers, sweep=sweep) for name in names]


class Reader:
    """One reading of layers: sorts keys into the top and the nodes, then fills in the defaults."""

    def __init__(self, typed: list[tuple[str, Any]], sweep: bool):
        self.typed, self.sweep = typed, sweep
        self.notes: dict[str, str] = {}
        self.top: dict[str, Any] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        named = {key: value for key, value in typed if key in AXES}
        self.choices = {axis: self._choose(axis, named) for axis in AXES if axis != "optimizer"}
        self.choices["optimizer"] = self._optimizer(named.get("optimizer"))
        self.known = self._nodes(foreign=False)
        firsts = {key.partition(".")[0] for key, _ in typed if "." in key} - top().keys()
        if {normal(first) for first in firsts} - set(map(normal, self.known)):
            self.known = self._nodes(foreign=True)

    def _choose(self, axis: str, named: Mapping[str, Any]) -> Choice | None:
        """The name typed or by default; None where the method or the data decide."""
        name = named.get(axis, top()[axis].default)
        if (name in (None, "auto") and axis != "engine") or (axis == "codec" and is_built(str(name))):
            return None
        return AXES[axis].choose(str(name))

    def _optimizer(self, name: Any) -> Choice | None:
        """The optimizer typed, for all methods or for this one, or the method's own by name."""
        method = self.choices["algorithm"]
        assert method is not None
        known = AXES["algorithm"].fields(method.target)
        for key, value in self.typed:
            name = value if normal(key) == normal(f"{method.name}.optimizer") else name
        if name is None and "optimizer" in known:
            name = known["optimizer"].default
        return AXES["optimizer"].choose(name) if isinstance(name, str) else None

    def _nodes(self, foreign: bool) -> dict[str, list[tuple[Axis, Any]]]:
        """Every node: what stands under its name on each axis."""
        found: dict[str, list[tuple[Axis, Any]]] = {}
        for axis in AXES.values():
            chosen = self.choices[axis.key]
            names = {choice.name: choice.target for choice in axis.nodes(foreign)}
            if chosen:
                names[chosen.name] = chosen.target
            for name, target in names.items():
                found.setdefault(name, []).append((axis, target))
        return found | {name: [(AXES["slice"], target)] for name, target in LOOSE.items()}

    def read(self) -> Settings:
        for key, value in self.typed:
            self._take(key, value)
        self._complete()
        choices = {axis: choice for axis, choice in self.choices.items() if choice}
        chosen = {choice.name for choice in choices.values()}
        for name in self.nodes:
            if name not in chosen and name not in OPTIONAL:
                axis = "algorithm" if name in LOOSE else self.known[name][0][0].key
                if self.top.get(axis) == "auto" and axis in ("model", "partition"):
                    continue  # the data decide; what they leave without a use is noted when they have
                for f in self.nodes[name] if name not in LOOSE or not uses(name, choices["algorithm"].target) else ():
                    self.notes[f"{name}.{f}"] = f"{name}.{f} does nothing here: {axis} is {self.top[axis]}"
        nodes = self._own_nodes(choices)
        return Settings(self.top, nodes, choices, self.notes, tuple(self.typed), self.sweep)

    def _take(self, key: str, value: Any) -> None:
        """Sort one setting into the top or a node, converted to its field's type."""
        first, _, rest = key.partition(".")
        if first in top() and not (rest and first in AXES):
            put(self.top, top()[first], rest, value, key)
        elif not rest:
            raise ValueError(self._unknown(first))
        elif first in AXES:
            self._selected(first, rest, value)
        else:
            node = spelled(first, self.known)
            if node is not None:
                self._set(node, self._fields(node), rest, value)
                return
            text = f"there is no {first!r} to set{near(first, [*self.known, *AXES])}"
            if not self.sweep:
                raise ValueError(text)
            self.notes[key] = text  # the node of a method of the user's own, which another run of the sweep has

    def _unknown(self, key: str) -> str:
        if (named := spelled(key, self.known)) is not None:
            axis = self.known[named][0][0].key
            return f"{key!r} is a name, not a setting: write {axis}={named}, or {named}.SETTING=..."
        published = [k for k in RUN if "." not in k]
        owners = [f"{n}.{key}" for n in self.known if key in self._fields(n)]
        if owners:
            return f"{key!r} is no setting of every run; write {' or '.join(owners[:3])}"
        return f"there is no setting {key!r}{near(key, [*top(), *published])}"

    def _fields(self, node: str) -> dict[str, Field]:
        """The fields of a node, over every axis that has its name."""
        return {name: f for axis, target in self.known[node] for name, f in axis.fields(target).items()}

    def _selected(self, axis: str, rest: str, value: Any) -> None:
        """`partition.alpha` is `alpha` of the partition chosen."""
        lenient, rest = rest.endswith("?"), rest.rstrip("?")
        choice = self.choices[axis]
        fields = self._fields(choice.name) if choice else {}
        if spelled(rest.partition(".")[0], fields) is not None:
            assert choice is not None
            self._set(choice.name, fields, rest, value)
            return
        chosen = f"{axis}={choice.name if choice else self.top.get(axis, 'auto')}"
        others = [n for n in AXES[axis].names() if rest in AXES[axis].fields(AXES[axis].names()[n])]
        if not others or not (lenient or self.sweep):
            hint = f"; it is a setting of {', '.join(others)}" if others else near(rest, fields)
            raise ValueError(f"{chosen} has no {rest!r}{hint}")
        self.notes[f"{axis}.{rest}"] = f"{axis}.{rest} does nothing here: {chosen} has no {rest!r}"

    def _set(self, node: str, fields: Mapping[str, Field], rest: str, value: Any) -> None:
        name, _, item = rest.partition(".")
        known = spelled(name, fields)
        if known is None:
            own = [f for f in fields if f not in training()] or list(fields)
            raise ValueError(f"{node} has no setting {name!r}{near(name, fields, own)}")
        put(self.nodes.setdefault(node, {}), fields[known], item, value, f"{node}.{rest if item else known}")

    def _complete(self) -> None:
        """Fill in defaults: of the method for how clients train, of the settings themselves for the rest."""
        method = self.choices["algorithm"]
        assert method is not None
        own = AXES["algorithm"].fields(method.target)
        node = self.nodes.get(method.name, {})
        lacking = [*(name for name in training() if name not in own), *self._parts_lacking(method.target)]
        for name in lacking:
            if self.top.pop(name, None) is not None:
                remark = f"{method.name} has no {name!r}"
                if not self.sweep:
                    raise ValueError(f"{remark}; leave it out, or choose another algorithm")
                self.notes[name] = f"{name} does nothing here: {remark}"
            self.choices.pop(name, None)
        typed = {**self.top, **{name: node.pop(name) for name in [*node] if name in training()}}
        for name, f in top().items():
            if name not in lacking or name in AXES:
                own_default = own[name].default if name in own else REQUIRED
                self.top[name] = _listed(typed.get(name, f.default if own_default is REQUIRED else own_default))
        for axis, choice in self.choices.items():
            if choice is not None:
                self.top[axis] = self._written(axis, choice)
        self.top = {name: self.top[name] for name in top() if name in self.top}

    def _parts_lacking(self, method: Any) -> list[str]:
        """The axes that are parts of a method and that this one does not have."""
        return [part for part in ("slice", "combine") if part not in fields_of(method)]

    def _written(self, axis: str, choice: Choice) -> str:
        """How a choice is written: its name, or the path that a user typed."""
        return str(self.top[axis]) if is_path(str(self.top.get(axis))) else choice.name

    def _own_nodes(self, choices: Mapping[str, Choice]) -> dict[str, dict[str, Any]]:
        """The nodes of what is chosen, complete; training settings of the method stand at the top."""
        nodes: dict[str, dict[str, Any]] = {}
        for axis, choice in choices.items():
            typed, node = self.nodes.get(choice.name, {}), nodes.setdefault(choice.name, {})
            for name, f in AXES[axis].fields(choice.target).items():
                if axis == "algorithm" and name in training():
                    continue
                if typed.get(name, f.default) is REQUIRED:
                    raise ValueError(f"{choice.name}.{name} has no default; set {choice.name}.{name}=...")
                node[name] = _listed(typed.get(name, f.default))
        for name, target in LOOSE.items():
            typed = self.nodes.get(name, {})
            if name in OPTIONAL:
                nodes |= {name: typed} if typed else {}
            elif uses(name, choices["algorithm"].target):
                nodes[name] = {f: _listed(typed.get(f, known.default)) for f, known in fields_of(target).items()}
        return nodes


def near(name: str, known: Iterable[str], few: Sequence[str] = ()) -> str:
    """`; did you mean X?`, or what there is if it is few, or where to look."""
    hint = nearest(name, known)
    if hint.startswith("did you mean"):
        return f"; {hint}"
    if 0 < len(few) <= 12:
        return f"; there is {', '.join(few)}"
    return "; `lilliput run --help` and `lilliput list` tell what there is"


def _listed(value: Any) -> Any:
    """Tuples as lists, which is how YAML gives them back."""
    if isinstance(value, tuple | list):
        return [_listed(item) for item in value]
    return {k: _listed(v) for k, v in value.items()} if isinstance(value, Mapping) else value
