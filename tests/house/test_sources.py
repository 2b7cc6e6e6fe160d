"""What may not stand in any file: code that runs data, giant modules, traces of the machine it was written on."""

from __future__ import annotations

import ast
import json
import re
import warnings

import pytest
import yaml

SOFT_LINES, HARD_LINES = 400, 600
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
# Called as module.function: each reads or writes pickles, builds any Python object from a file, or runs a shell.
BANNED_CALLS = {
    "torch.load": "pickle runs code: read safetensors",
    "torch.save": "pickle runs code: write safetensors",
    "torch.jit.load": "runs code: read safetensors",
    "torch.hub.load": "downloads and runs code",
    "yaml.load": "builds any object: yaml.safe_load",
    "yaml.full_load": "builds objects: yaml.safe_load",
    "yaml.unsafe_load": "builds any object: yaml.safe_load",
    "os.system": "a shell: subprocess.run with a list",
    "os.popen": "a shell: subprocess.run with a list",
}
# Keywords that may be given only as the constant on the right.
BANNED_KEYWORDS = {
    "allow_pickle": False,
    "trust_remote_code": False,
    "weights_only": True,
    "custom_pipeline": None,
    "use_safetensors": True,
    "shell": False,
}
# No home folder, work folder or mount point of some machine; a URL's path is not meant.
MACHINE_PATH = re.compile(rb"(?<![\w/.:~$}>-])/(?:home|Users|root|work|workspaces?|mnt|scratch)/[\w.@-]+")
# No index, mirror or registry: whoever installs decides where from.
INDEX = re.compile(rb"--(?:extra-)?index-url[ =]\s*\w|--find-links[ =]\s*[\w/]|://[^\s\"'<>)]*/simple(?:/|\b)")


def violations(tree: ast.AST) -> list[tuple[int, str]]:
    """``(line, what)`` for each construct that could run data as code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, f"import {a.name}") for a in node.names if a.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PICKLES:
            found.append((node.lineno, f"from {node.module} import …"))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if isinstance(node.func, ast.Name) and called in RUNS_CODE:
                found.append((node.lineno, f"{called}(): runs data as code"))
            if called in BANNED_CALLS:
                found.append((node.lineno, f"{called}: {BANNED_CALLS[called]}"))
            for keyword in node.keywords:
                if keyword.arg in BANNED_KEYWORDS:
                    value, only = keyword.value, BANNED_KEYWORDS[keyword.arg]
                    if not (isinstance(value, ast.Constant) and value.value is only):
                        found.append((node.lineno, f"{keyword.arg}={ast.unparse(value)}: only {only} is allowed"))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and target.attr == "engine_host_code_allowed":
                    found.append((node.lineno, "engine_host_code_allowed: an engine may not bring host code"))
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "Pipeline.from_pretrained(name, trust_remote_code=True)",
        "Pipeline.from_pretrained(name, use_safetensors=False)",
        "subprocess.run(line, shell=True)",
        "runtime.engine_host_code_allowed = True",
    ],
)
def test_the_guard_sees(code):
    assert violations(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["model.eval()", "re.compile('x')", "np.load(path)", "yaml.safe_load(text)", "torch.compile(f)"]
)
def test_the_guard_lets_pass(code):
    assert not violations(ast.parse(code))


def test_no_data_is_run_as_code(sources):
    """In everything but the tests, which have to make the attacks that the code refuses."""
    found = [
        f"{source.path}:{line}: {what}"
        for source in sources
        if source.folder != "tests"
        for line, what in violations(source.tree)
    ]
    assert not found, "\n".join(found)


def test_files_are_small(sources):
    lengths = {source.path: source.text.count("\n") for source in sources}
    large = {path: lines for path, lines in lengths.items() if lines > SOFT_LINES}
    for path, lines in large.items():
        warnings.warn(f"{path} has {lines} lines: consider two files (soft cap {SOFT_LINES})", stacklevel=1)
    huge = [f"{path}: {lines} lines" for path, lines in large.items() if lines > HARD_LINES]
    assert not huge, f"over {HARD_LINES} lines: " + ", ".join(huge)


def test_no_grab_bags(sources):
    assert [
        s.path for s in sources if s.path.rpartition("/")[2] in ("utils.py", "helpers.py", "common.py", "misc.py")
    ] == []


def readable(data: bytes) -> bytes:
    """The part of a file that holds text: all of it, a safetensors header, or nothing."""
    if b"\0" not in data[:8192]:
        return data
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length] if length < len(data) and data[8:9] == b"{" else b""


def test_no_traces_of_a_machine(root, files):
    found = []
    for name in files:
        text = readable((root / name).read_bytes())
        for pattern in (MACHINE_PATH, INDEX):
            found += [f"{name}: {match.group().decode(errors='replace')}" for match in pattern.finditer(text)]
    assert not found, "\n".join(found)


class UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is there twice: {keys}"
        return super().construct_mapping(node, deep)


# mkdocs.yml names functions of its plugins by Python's tags; here they are read as plain values.
UniqueKeys.add_multi_constructor(
    "tag:yaml.org,2002:python/",
    lambda loader, suffix, node: (
        loader.construct_mapping(node, deep=True) if isinstance(node, yaml.MappingNode) else suffix
    ),
)


def test_data_files_have_unique_keys(root, files):
    def unique(pairs):
        assert len(pairs) == len(dict(pairs)), f"a key is there twice: {[key for key, _ in pairs]}"
        return dict(pairs)

    for name in files:
        if name.endswith((".yaml", ".yml")):
            UniqueKeys((root / name).read_text(encoding="utf-8")).get_single_data()
        elif name.endswith(".json"):
            json.loads((root / name).read_text(encoding="utf-8"), object_pairs_hook=unique)
