"""Writes a strict JSON schema for each kind that the chart and k8s/ use, for kubeconform.

usage: kube_schemas.py SWAGGER FOLDER
"""

import json
import pathlib
import sys

KINDS = """ConfigMap Secret Service ServiceAccount Pod Deployment StatefulSet Job HorizontalPodAutoscaler PodDisruptionBudget
NetworkPolicy Ingress Role RoleBinding""".split()


def strict(node, needed):
    """Returns the node with unknown fields forbidden and references into the same file; adds their names to `needed`."""
    if isinstance(node, list):
        return [strict(one, needed) for one in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[1]
        needed.add(name)
        return {"$ref": f"#/definitions/{name}"}
    if node.get("format") == "int-or-string":
        return {"type": ["integer", "string"]}
    node = {key: strict(value, needed) for key, value in node.items() if key not in ("description", "format") or isinstance(value, dict)}
    if "properties" in node and "additionalProperties" not in node:
        node["additionalProperties"] = False
    return node


def main():
    definitions = json.loads(pathlib.Path(sys.argv[1]).read_text())["definitions"]
    # A quantity may be a string or a number. A time is a plain string, because `strict` drops formats.
    for name, definition in definitions.items():
        if name.endswith(".Quantity"):
            definitions[name] = {"type": ["string", "number"]}
    folder = pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for definition in list(definitions.values()):
        for kind in definition.get("x-kubernetes-group-version-kind", []):
            if kind["kind"] not in KINDS:
                continue
            needed, done, closure = set(), set(), {}
            schema = strict(definition, needed)
            while needed - done:
                name = (needed - done).pop()
                done.add(name)
                closure[name] = strict(definitions[name], needed)
            for field in ("apiVersion", "kind"):
                schema["properties"][field] = {"type": "string"}
            schema["definitions"] = closure
            group = kind["group"].split(".")[0]
            parts = [part for part in (kind["kind"].lower(), group, kind["version"]) if part]
            (folder / f"{'-'.join(parts)}.json").write_text(json.dumps(schema))


main()
