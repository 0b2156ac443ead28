"""Write down which operators a torch-tensorrt wheel converts; it is read, not imported.

pip download --no-deps torch-tensorrt==2.13.0
cd test/frontend && python list_tensorrt_operators.py torch_tensorrt-*.whl >tensorrt_operators.json
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator

DYNAMO = "torch_tensorrt/dynamo/"


def decorated(source: str, decorator: str) -> Iterator[str]:
    """First arguments of a decorator wherever it is used: `torch.ops.aten.add.Tensor`."""
    for node in ast.walk(ast.parse(source)):
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == decorator:
                name = ast.unparse(call.args[0])
                if "." in name:  # not a loop's variable
                    yield name


def sets(source: str) -> dict[str, list[str]]:
    """Module-level sets of operators by name."""
    return {
        node.target.id: sorted(operator_name(ast.unparse(item)) for item in node.value.elts)
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Set)
    }


def operator_name(text: str) -> str:
    """`aten.add.Tensor` from any way of writing it."""
    return text.removeprefix("torch.ops.")


def main() -> None:
    """Print the lists as JSON."""
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        files = {n: wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".py")}
    version = next(n for n in wheel.namelist() if n.endswith("dist-info/METADATA")).split("-")[1]
    converters = {
        operator_name(name)
        for path, text in files.items()
        if path.startswith(f"{DYNAMO}conversion/")
        for name in decorated(text, "dynamo_tensorrt_converter")
    }
    lowering = files[f"{DYNAMO}lowering/_decompositions.py"]
    groups = sets(files[f"{DYNAMO}lowering/_decomposition_groups.py"])
    lists = {
        "torch_tensorrt": version.removesuffix(".dist"),
        "converters": sorted(converters),
        "own_decompositions": sorted(
            operator_name(n) for n in decorated(lowering, "register_torch_trt_decomposition")
        ),
        "enabled_decompositions": groups["torch_enabled_decompositions"],
        "disabled_decompositions": groups["torch_disabled_decompositions"],
    }
    print(json.dumps(lists, indent=1))


if __name__ == "__main__":
    main()
