"""Colours, marks and legends."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments import record, style


class TestStyle:
    def rows(self) -> pd.DataFrame:
        rows = [
            {
                "x": x,
                "method": method,
                "y": 1.0 * x,
                "source": source,
                "device": f"dev {source}",
                "oom": x == 2,
            }
            for x in (1, 2)
            for method in ("packing", "DynaPipe", "something else")
            for source in record.SOURCES
        ]
        return pd.DataFrame(rows)

    def test_a_method_has_one_colour_in_every_figure(self) -> None:
        assert style.method_color("MLM+DS") == style.method_color("mlm+ds") == style.ORANGE
        assert style.method_color("made up") == style.method_color("made up")
        many = [f"method {number}" for number in range(len(style.PALETTE))]
        assert len(set(style.method_colors(many).values())) == len(many)
        assert style.method_colors(["zzz", "DynaPipe"])["DynaPipe"] == style.BLUE

    def test_sources_are_drawn_differently(self) -> None:
        looks = list(style.SOURCE_STYLES.values())
        assert set(style.SOURCE_STYLES) == set(record.SOURCES)
        assert len({(look.hatch, look.fill_alpha) for look in looks}) == len(looks)
        assert len({look.marker for look in looks}) == len({look.line for look in looks}) == len(looks)

    def test_bars_leave_out_what_ran_out_of_memory_and_mark_it(self) -> None:
        _, axes = style.subplots()
        assert axes.shape == (1, 1)
        ax = axes[0, 0]
        style.grouped_bars(ax, self.rows(), category="x", value="y", out_of_memory="oom")
        heights = [bar.get_height() for bars in ax.containers for bar in bars]
        assert len(heights) == 2 * 3 * 3
        assert sorted(height for height in heights if not np.isnan(height)) == [1.0] * 9
        crosses = [x for line in ax.lines for x in line.get_xdata()]
        assert len(crosses) == 9 and all(1.5 > x > 0.5 for x in crosses)

    def test_the_legend_says_source_device_and_out_of_memory(self) -> None:
        figure, axes = style.subplots(1, 2)
        rows = self.rows()
        style.lines(axes[0, 0], rows, x="x", y="y")
        style.points(axes[0, 1], rows, x="x", y="y", diagonal=True)
        style.legend(figure, rows, out_of_memory="oom")
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels == [
            "packing", "DynaPipe", "something else",
            *(f"{source}: dev {source}" for source in record.SOURCES), "out of memory or not profiled",
        ]  # fmt: skip

    def test_boxes_have_one_group_for_each_category(self) -> None:
        _, axes = style.subplots()
        style.boxes(axes[0, 0], self.rows(), category="x", value="y")
        assert [label.get_text() for label in axes[0, 0].get_xticklabels()] == ["1", "2"]
        assert len(axes[0, 0].patches) == 2 * 9
