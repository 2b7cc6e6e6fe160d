"""The tab Inspect: what it draws of routes and masks; the rest is the report's own and tested there."""

from __future__ import annotations

from dataclasses import replace

from qdiff.app.plan_picture import inspect, route_map
from qdiff.app.sources import Sources
from qdiff.plan.routing_plan import REUSE
from qdiff.report.data import RoutesResult, RoutingResult

ROUTING = RoutingResult(
    recipes=["int8", "nvfp4"],
    blocks=["blocks.0", "<b>blocks.1"],
    chosen="table",
    timesteps=[999.0, 500.0, 1.0],
    routes=[[1, 1], [REUSE, 1], [0, 0]],
    tried=[RoutesResult("table", "rule", 5.5, 47.9)],
    used_bits=5.5,
)


def test_a_cell_for_each_block_and_step():
    drawn = route_map(ROUTING)
    assert drawn.count("qd-map-row") == 2 and drawn.count("--share:100%") == 6 and "--columns:3" in drawn
    assert "blocks.0 at timestep 500: left out" in drawn and "blocks.0 at timestep 999: nvfp4" in drawn
    assert "<b>" not in drawn, "names are text"
    assert "left out" not in route_map(replace(ROUTING, routes=[[1, 1], [0, 1], [0, 0]]))


def test_a_run_without_routes_and_masks_has_no_section_for_them(finished, tmp_path):
    source = next(each for each in Sources([finished.path], tmp_path, []).all() if each.run is not None)
    page = inspect(source)
    assert "The plan" in page and "Precision by step" not in page and "Sparse attention" not in page
