"""Which fields of which dataclasses the code reads, by a light inference of types over its syntax trees.

A type is a set of classes of pi0fm that an expression may hold, itself or inside a list, a dict or an optional. It is known for annotated
arguments and fields, `self`, calls of classes and of annotated functions, and what is assigned, iterated or indexed from those. A read is
`expression.field` with the class, or one of its bases, in the expression's type; `getattr(expression, "field")` too, and with a variable
in place of the name, every text in the same function.
A validation that only refuses values reads nothing: what `__post_init__` of any class reads does not count.
"""

import ast
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Types = frozenset[str]  # of "module:Class"
NONE: Types = frozenset()
SAME = {"replace", "sorted", "list", "tuple", "next", "iter", "reversed", "max", "min", "enumerate", "zip", "dict", "set", "cast"}
HOLDERS = {"items", "values", "get", "setdefault", "pop", "copy"}


@dataclass
class Module:
    """names: of classes and functions that it defines or imports -> "module:name"."""

    tree: ast.Module
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        definitions = (ast.ImportFrom, ast.Import, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Assign)
        self.definitions = [node for node in ast.walk(self.tree) if isinstance(node, definitions)]


@dataclass
class Code:
    """Everything that the inference knows of the packages."""

    modules: dict[str, Module]
    bases: dict[str, list[str]] = field(default_factory=dict)
    fields: dict[str, dict[str, Types]] = field(default_factory=lambda: defaultdict(dict))
    returns: dict[str, Types] = field(default_factory=dict)
    reads: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def ancestry(self, name: str) -> list[str]:
        """The class and all its bases."""
        return [name, *(each for base in self.bases.get(name, []) for each in self.ancestry(base))]


@cache
def read_code(*roots: tuple[Path, str]) -> Code:
    """Infer over every module below the roots, each a folder and the name of its package."""
    code = Code({})
    for folder, package in roots:
        for path in sorted(folder.rglob("*.py")):
            words = [package, *path.relative_to(folder).with_suffix("").parts]
            code.modules[".".join(words).removesuffix(".__init__")] = Module(ast.parse(path.read_text()))
    for name, module in code.modules.items():
        _names(code, name, module)
    for name, module in code.modules.items():
        for node in module.definitions:
            if isinstance(node, ast.ClassDef):
                _class(code, name, module, node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                code.returns.setdefault(f"{name}:{node.name}", _annotated(code, module, node.returns))
    for name, module in code.modules.items():
        _Walk(code, name, module).visit(module.tree)
    return code


def _names(code: Code, name: str, module: Module) -> None:
    for node in module.definitions:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                module.names[alias.asname or alias.name] = whole if whole in code.modules else f"{node.module}:{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                module.names[alias.asname or alias.name.split(".")[0]] = alias.name
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            module.names.setdefault(node.name, f"{name}:{node.name}")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (named := _resolved(module, node.value)):
            module.names.setdefault(node.targets[0].id, named)  # Options = TrainingRun


def _class(code: Code, name: str, module: Module, node: ast.ClassDef) -> None:
    own = f"{name}:{node.name}"
    code.bases[own] = [each for base in node.bases for each in [_resolved(module, base)] if each]
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            code.fields[own][statement.target.id] = _annotated(code, module, statement.annotation)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            code.fields[own].setdefault(statement.name, _annotated(code, module, statement.returns))  # a property, or what a call returns


def _resolved(module: Module, node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return module.names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in module.names:
        return f"{module.names[node.value.id]}:{node.attr}"
    return None


def _annotated(code: Code, module: Module, node: ast.AST | None) -> Types:
    if node is None:
        return NONE
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if not re.fullmatch(r"[\w.\[\], |]+", node.value):
            return NONE
        try:
            node = ast.parse(node.value, mode="eval").body
        except SyntaxError:  # axes of an array, or a word
            return NONE
    found = {_resolved(module, each) for each in ast.walk(node) if isinstance(each, ast.Name | ast.Attribute)}
    inner = [each for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return frozenset(each for each in found if each) | frozenset().union(*(_annotated(code, module, each) for each in inner))


class _Walk(ast.NodeVisitor):
    """Walks one module, with the types of the names in scope."""

    def __init__(self, code: Code, name: str, module: Module) -> None:
        self.code, self.name, self.module = code, name, module
        self.scopes: list[dict[str, Types]] = [{}]
        self.owner: str | None = None
        self.validating = False
        self.function: ast.AST | None = None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.owner = self.owner, f"{self.name}:{node.name}"
        self.generic_visit(node)
        self.owner = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope = {each.arg: _annotated(self.code, self.module, each.annotation) for each in arguments}
        if self.owner is not None and arguments and arguments[0].arg == "self":
            scope["self"] = frozenset([self.owner])
        validated, self.validating = self.validating, self.validating or node.name == "__post_init__"
        before, self.function = self.function, node
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()
        self.validating, self.function = validated, before

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]  # noqa: N815

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.scopes.append({each.arg: NONE for each in node.args.args})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        self._bind(node.target, _annotated(self.code, self.module, node.annotation))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._bind(node.target, self.type_of(node.value))

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, self.type_of(node.iter))
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is not None:
                self._bind(item.optional_vars, self.type_of(item.context_expr))
        self.generic_visit(node)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        for each in node.generators:
            self._bind(each.target, self.type_of(each.iter))
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension  # noqa: N815

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self._read(self.type_of(node.value), node.attr)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            self._read(self.type_of(node.args[0]), str(node.args[1].value))
        elif name == "getattr" and len(node.args) > 1:
            types = self.type_of(node.args[0])
            for each in ast.walk(self.function) if types and self.function is not None else ():  # the names that it may be called with
                if isinstance(each, ast.Constant) and isinstance(each.value, str):
                    self._read(types, each.value)

    def _read(self, types: Types, attribute: str) -> None:
        if not self.validating:
            for each in types:
                for cls in self.code.ancestry(each):
                    self.code.reads[cls].add(attribute)

    def _assign(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for each, inner in zip(target.elts, value.elts, strict=True):
                self._assign(each, inner)
            return
        self._bind(target, self.type_of(value))

    def _bind(self, target: ast.AST, types: Types) -> None:
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = self.scopes[-1].get(target.id, NONE) | types
        elif isinstance(target, ast.Tuple | ast.List):
            for each in target.elts:
                self._bind(each, types)
        elif isinstance(target, ast.Attribute):
            for owner in self.type_of(target.value):
                self.code.fields[owner][target.attr] = self.code.fields[owner].get(target.attr, NONE) | types

    def type_of(self, node: ast.AST) -> Types:
        """The classes that an expression may hold."""
        match node:
            case ast.Name():
                for scope in reversed(self.scopes):
                    if node.id in scope:
                        return scope[node.id]
                return NONE
            case ast.Attribute():
                inner = self.type_of(node.value)
                fields = (self.code.fields.get(cls, {}).get(node.attr, NONE) for each in inner for cls in self.code.ancestry(each))
                return frozenset().union(*fields)
            case ast.Call():
                return self._called(node)
            case ast.Subscript() | ast.Starred() | ast.Await() | ast.NamedExpr():
                return self.type_of(node.value)
            case ast.IfExp():
                return self.type_of(node.body) | self.type_of(node.orelse)
            case ast.BoolOp():
                return frozenset().union(*map(self.type_of, node.values))
            case ast.BinOp():
                return self.type_of(node.left) | self.type_of(node.right)
            case ast.List() | ast.Tuple() | ast.Set():
                return frozenset().union(*map(self.type_of, node.elts))
            case ast.Dict():
                return frozenset().union(*map(self.type_of, node.values))
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                return self.type_of(node.elt)
            case ast.DictComp():
                return self.type_of(node.value)
        return NONE

    def _called(self, node: ast.Call) -> Types:
        target = _resolved(self.module, node.func)
        found = self.code.returns.get(target, NONE) if target else NONE
        if target in self.code.bases:
            found |= {target}
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in SAME:
            found = found.union(*map(self.type_of, node.args))
        if name in ("decode", "parse") and node.args and (cls := _resolved(self.module, node.args[0])):
            found |= {cls}
        if isinstance(node.func, ast.Attribute):
            found |= self.type_of(node.func.value) if node.func.attr in HOLDERS else self.type_of(node.func)
        return found
