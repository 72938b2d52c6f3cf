"""Makes pytest-benchmark write our record: it would name the machine and its user."""

from __future__ import annotations

from typing import Any

import record


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    rows = []
    for each in output_json["benchmarks"]:
        stats = each["stats"]
        rows.append(
            {**each["extra_info"], "seconds": record.spread(stats["data"]), "rounds": stats["rounds"]}
        )
    output_json.clear()
    output_json.update(kind="micro", rows=rows, **record.header())
