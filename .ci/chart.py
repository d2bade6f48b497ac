"""Generate the parts of the Helm chart that come from code: the queue's users, the setting names, the dashboards.

`python .ci/chart.py` writes them; tests/deploy/test_chart.py fails if the committed files differ. With a folder as
argument it writes the rendered chart of each values file.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from protocol.queue.users import acl, table
from protocol.runtime.settings import Settings

DEPLOY = Path(__file__).parent.parent / "deploy"
CHART = DEPLOY / "helm" / "lorafleet"
DASHBOARDS = DEPLOY / "grafana" / "dashboards"
COPIES = CHART / "files" / "dashboards"
"""The chart's copies of the dashboards: Helm reads no files outside a chart."""

ACL, SCHEMA = CHART / "files" / "users.acl", CHART / "values.schema.json"


def acl_file() -> str:
    """Return the ACL file with `{user}` in place of the hash of each user's password."""
    passwords = {user: user for user in table()}
    text = acl(passwords)
    for user in passwords:
        text = text.replace("#" + hashlib.sha256(user.encode()).hexdigest(), f"#{{{user}}}")
    return text


def setting_types() -> dict[str, Any]:
    """Return a JSON schema for each setting, by name."""
    found: dict[str, Any] = {}
    for name, field in Settings.model_json_schema(mode="serialization")["properties"].items():
        kinds = [part.get("type") for part in field.get("anyOf", [field])]
        kind = next((kind for kind in kinds if kind != "null"), "string")
        found[name] = {"description": field["description"], "type": kind}
        if "enum" in field:
            found[name]["enum"] = field["enum"]
    return found


def schema() -> str:
    """Return the chart's values schema with the current settings."""
    now = json.loads(SCHEMA.read_text())
    now["$defs"]["settings"] = {"type": "object", "additionalProperties": False, "properties": setting_types()}
    return json.dumps(now, indent=2) + "\n"


def copy_dashboards() -> None:
    """Copy the dashboards into the chart."""
    shutil.rmtree(COPIES, ignore_errors=True)
    shutil.copytree(DASHBOARDS, COPIES)


def render(folder: Path) -> None:
    """Write the chart as rendered by Helm's engine for each values file, for checkov."""
    helm, yaml = importlib.import_module("helm_python"), importlib.import_module("yaml")
    chart = helm.Chart.load(str(CHART))
    folder.mkdir(parents=True, exist_ok=True)
    for file in (CHART / "ci").glob("*-values.yaml"):
        texts = chart.render(yaml.safe_load(file.read_text()) or {}, name="lf", namespace="ml", is_install=True)
        objects = [text for path, text in texts.items() if path.endswith(".yaml") and text.strip()]
        (folder / file.name).write_text("\n---\n".join(objects))


def main(args: list[str]) -> None:
    """Write all generated files; with a folder, the rendered charts instead."""
    if args:
        render(Path(args[0]))
        return
    ACL.write_text(acl_file())
    SCHEMA.write_text(schema())
    copy_dashboards()


if __name__ == "__main__":
    main(sys.argv[1:])
