"""Colours and type of the page. System fonts only: Gradio's own themes fetch theirs from another host."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradio.themes import Base


def theme() -> "Base":
    """Return a quiet theme in the report's colours."""
    from gradio.themes import Base
    from gradio.themes.utils import colors, sizes

    teal = colors.Color(
        name="qdiff", c50="#eef7f5", c100="#d5ece8", c200="#aedad3", c300="#7fc4ba", c400="#4fab9f", c500="#2a8f83",
        c600="#0f6b62", c700="#0d5951", c800="#0b4741", c900="#093934", c950="#062622",
    )  # fmt: skip
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    made = Base(
        primary_hue=teal,
        secondary_hue=teal,
        neutral_hue=colors.stone,
        radius_size=sizes.radius_md,
        font=fonts,
        font_mono=mono,
    )
    return made.set(
        body_background_fill="#fcfcfa",
        body_background_fill_dark="#121417",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_padding="4px 0",
        block_shadow="none",
        block_shadow_dark="none",
        border_color_primary="#dfdfd7",
        border_color_primary_dark="#30353b",
        input_border_width="1px",
        input_border_color="#d4d4ca",
        input_border_color_dark="#3a4047",
        input_background_fill="#ffffff",
        input_background_fill_dark="#14171a",
        button_secondary_background_fill="#f3f3ee",
        button_secondary_background_fill_hover="#e8e8e0",
        button_secondary_background_fill_dark="#24282d",
        button_secondary_background_fill_hover_dark="#2e3339",
        checkbox_label_background_fill="#f3f3ee",
        checkbox_label_background_fill_dark="#24282d",
        button_primary_background_fill="#0f6b62",
        button_primary_background_fill_hover="#0d5951",
        button_primary_background_fill_dark="#2a8f83",
        button_primary_background_fill_hover_dark="#4fab9f",
        button_primary_text_color="#ffffff",
        block_label_text_size="*text_sm",
    )
