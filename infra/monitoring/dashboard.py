"""Grafana's dashboard as code: prints adaconv.json, which lies beside it and is what Grafana reads.

python -m infra.monitoring.dashboard > infra/monitoring/grafana/dashboards/adaconv.json
"""

import json
from typing import Any

# title, unit, (legend, query) of each; two panels a row.
PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "Training: steps done, and in a checkpoint",
        "none",
        [("step", "max(ray_adaconv_train_step)"), ("checkpoint", "max(ray_adaconv_train_checkpoint_step)")],
    ),
    ("Training: loss", "none", [("loss", "avg(ray_adaconv_train_loss)")]),
    ("Training: images a second", "none", [("images/s", "sum(ray_adaconv_train_images_per_second)")]),
    ("Training: share of time waiting for data", "percentunit", [("wait", "max(ray_adaconv_train_data_wait_share)")]),
    ("Training: seconds a step", "s", [("step", "max(ray_adaconv_train_step_seconds)")]),
    (
        "Stylization: outputs a second, by state",
        "none",
        [("{{state}}", "sum by (state) (rate(ray_adaconv_outputs_total[1m]))")],
    ),
    ("Sharding: images a second", "none", [("{{stage}}", "sum by (stage) (rate(ray_adaconv_images_total[1m]))")]),
    ("Sharding: images quarantined", "none", [("{{stage}}", "sum by (stage) (ray_adaconv_images_quarantined)")]),
    ("Nodes: CPU", "percent", [("{{instance}}", "avg by (instance) (ray_node_cpu_utilization)")]),
    ("Nodes: memory used", "bytes", [("{{instance}}", "sum by (instance) (ray_node_mem_used)")]),
    ("Nodes: GPU", "percent", [("{{instance}} {{GpuIndex}}", "ray_node_gpus_utilization")]),
    ("Nodes: disk free", "bytes", [("{{instance}}", "sum by (instance) (ray_node_disk_free)")]),
]


def dashboard() -> dict[str, Any]:
    return {
        "uid": "adaconv",
        "title": "adaconv",
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "15s",
        "time": {"from": "now-3h", "to": "now"},
        "panels": [
            {
                "id": number + 1,
                "type": "timeseries",
                "title": title,
                "datasource": {"type": "prometheus", "uid": "prometheus"},
                "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend}
                    for index, (legend, query) in enumerate(queries)
                ],
            }
            for number, (title, unit, queries) in enumerate(PANELS)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
