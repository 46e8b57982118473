"""Draws the DS-Block as docs/block.svg: ``python docs/block_figure.py``.

Shapes are those of the first stage of DS-Net-T for an image of 224 × 224. A step is drawn as what
runs it: an operation with a native kernel, or plain PyTorch.
"""

import re
from pathlib import Path
from xml.sax.saxutils import escape

TARGET = Path(__file__).with_name("block.svg")

GRID, CHANNELS, REDUCTION = 56, 64, 8
MLP_RATIO = 4
NATIVE = {
    "depthwise_conv3x3",
    "global_attention",
    "co_attention",
    "upsample_concat",
    "pointwise_mlp",
}

HALF = CHANNELS // 2
COARSE = GRID // REDUCTION
LOCAL_TOKENS, GLOBAL_TOKENS = GRID**2, COARSE**2
WHOLE_SHAPE = f"{GRID}×{GRID}×{CHANNELS}"
LOCAL_SHAPE = f"{GRID}×{GRID}×{HALF}"
GLOBAL_SHAPE = f"{GLOBAL_TOKENS}×{HALF}"

TITLE = "The DS-Block"
DESCRIPTION = (
    "Eight steps from top to bottom. 1: a depthwise convolution encodes position. 2: a 1×1"
    " convolution, whose channels are split into two streams. The local stream, left, passes"
    " 3: a depthwise convolution. The global stream, right, passes 4: bilinear downsampling and"
    " 5: self-attention. 6: co-attention lets each stream read the other. 7: upsampling,"
    " concatenation and a 1×1 convolution join them, adding the result of step 1. 8: an MLP."
    " Steps 2 and 4 are plain PyTorch, the others fused operations with native kernels."
)

WIDTH = 920
LEFT, RIGHT = 110, 810
STREAM = 330
LOCAL, MIDDLE, GLOBAL = LEFT + STREAM / 2, (LEFT + RIGHT) / 2, RIGHT - STREAM / 2
RAIL = 56
BOX = 56

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
STYLE = f"""
text {{ font-family: {SANS}; font-size: 14px; fill: #1f2328; }}
.code {{ font-family: {MONO}; font-size: 15px; font-weight: bold; }}
.panel {{ fill: #ffffff; stroke: #d0d7de; }}
.heading {{ font-size: 19px; font-weight: bold; }}
.strong {{ font-weight: bold; }}
.soft {{ font-size: 13px; fill: #57606a; }}
.badge {{ font-size: 12px; font-weight: bold; fill: #ffffff; }}
.flow {{ fill: none; stroke: #424a53; stroke-width: 1.6; marker-end: url(#tip); }}
.native {{ fill: #d5f2df; stroke: #1a7f37; stroke-width: 2.2; }}
.plain {{ fill: #f6f8fa; stroke: #8c959f; stroke-width: 1.2; }}
"""


def kind(name: str) -> str:
    """The style of the step that calls ``name``."""
    return "native" if name in NATIVE else "plain"


def spans(text: str) -> str:
    """Text with ``_a`` as a subscript and ``^a`` as a superscript."""
    out, back = [], 0
    for part in re.split(r"([_^]\w)", text):
        if not part:
            continue
        if part[0] in "_^":
            shift = 4 if part[0] == "_" else -5
            out.append(f'<tspan dy="{shift - back}" font-size="10">{part[1]}</tspan>')
            back = shift
        elif back:
            out.append(f'<tspan dy="{-back}">{escape(part)}</tspan>')
            back = 0
        else:
            out.append(escape(part))
    return "".join(out)


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    """A line of text; only names in code keep their underscores."""
    inner = escape(content) if style == "code" else spans(content)
    return (
        f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}" xml:space="preserve">'
        f"{inner}</text>"
    )


def box(x: float, y: float, width: float, height: float, style: str, radius: int = 8) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"'
        f' class="{style}"/>'
    )


def badge(number: int, x: float, y: float) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="#424a53"/>' + text(
        x, y + 4.3, str(number), "badge", "middle"
    )


def step(number: int, name: str, formula: str, x: float, y: float, width: float) -> str:
    """A box of the step's style: its number, the operation or what PyTorch does, its formula."""
    style = kind(name)
    centre = x + width / 2
    return "\n".join(
        [
            box(x, y, width, BOX, style),
            badge(number, x + 24, y + BOX / 2),
            text(centre, y + 23, name, "strong" if style == "plain" else "code", "middle"),
            text(centre, y + 44, formula, "", "middle"),
        ]
    )


def flow(*points: tuple[float, float]) -> str:
    """An arrow through the points."""
    path = " L ".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="M {path}" class="flow"/>'


def tensor(x: float, top: float, bottom: float, name: str, shape: str) -> str:
    """A downward arrow, with the tensor that it carries."""
    end = text(x + 12, bottom - 14, f"{name}   {shape}", "soft")
    return flow((x, top), (x, bottom)) + "\n" + end


def stream(x: float, top: float, bottom: float, name: str, note: str, fill: str) -> str:
    """The band behind one stream."""
    return "\n".join(
        [
            f'<rect x="{x:g}" y="{top:g}" width="{STREAM}" height="{bottom - top:g}"'
            f' fill="{fill}"/>',
            text(x + 12, top + 24, name, "strong"),
            text(x + 12, top + 42, note, "soft"),
        ]
    )


def co_attention(y: float, height: float) -> str:
    """Step 6 over both streams: what each reads of the other."""
    reach = 64
    left, right = MIDDLE - reach, MIDDLE + reach
    return "\n".join(
        [
            box(LEFT, y, RIGHT - LEFT, height, kind("co_attention")),
            badge(6, LEFT + 24, y + 28),
            text(LEFT + 46, y + 33, "co_attention", "code"),
            flow((right, y + 26), (left, y + 26)),
            text(MIDDLE, y + 19, "K_g, V_g", "soft", "middle"),
            flow((left, y + 36), (right, y + 36)),
            text(MIDDLE, y + 52, "K_l, V_l", "soft", "middle"),
            text(LOCAL, y + 76, f"{LOCAL_TOKENS} local tokens read {GLOBAL_TOKENS} global ones",
                 "soft", "middle"),
            text(GLOBAL, y + 76, f"{GLOBAL_TOKENS} global tokens read {LOCAL_TOKENS} local ones",
                 "soft", "middle"),
            text(LOCAL, y + 99, "f′ = f + Linear(softmax(Q_lK_g^T/√d) V_g)", "", "middle"),
            text(GLOBAL, y + 99, "g′ = g_1 + Linear(softmax(Q_gK_l^T/√d) V_l)", "", "middle"),
        ]
    )  # fmt: skip


def legend(y: float) -> str:
    rows = [
        (
            "native",
            "one fused operation, native kernel",
            "DW3: depthwise 3×3 convolution",
        ),
        ("plain", "plain PyTorch", "BN: BatchNorm · LN: LayerNorm"),
        (None, "", "MHSA: multi-head self-attention"),
    ]
    parts = []
    for i, (style, meaning, abbreviation) in enumerate(rows):
        baseline = y + 28 * i
        if style:
            parts.append(box(LEFT, baseline - 14, 34, 18, style, radius=4))
        parts += [
            text(LEFT + 46, baseline, meaning),
            text(RIGHT - STREAM, baseline, abbreviation, "soft"),
        ]
    return "\n".join(parts)


def draw() -> str:
    """The figure as SVG text."""
    whole = RIGHT - LEFT
    hidden = MLP_RATIO * CHANNELS
    position, split = 92, 196
    fork = split + BOX
    down, attend = fork + 60, fork + 60 + BOX + 42
    aside = (down + attend + BOX) / 2 - BOX / 2
    align = attend + BOX + 42
    align_height = 116
    fuse = align + align_height + 42
    mlp = fuse + BOX + 42
    end = mlp + BOX + 42
    parts = [
        text(LEFT, 42, TITLE, "heading"),
        text(RIGHT, 42, "first stage of DS-Net-T, 224×224 pixels", "soft", "end"),
        stream(LEFT, fork, fuse, "local stream", f"stays at {GRID}×{GRID}", "#fdf5e3"),
        stream(RIGHT - STREAM, fork, fuse, "global stream", "1/32 of the image", "#f4edfb"),
        tensor(MIDDLE, position - 34, position, "x", WHOLE_SHAPE),
        step(1, "depthwise_conv3x3", "x_1 = x + DW3(x), the position encoding",
             LEFT, position, whole),
        tensor(MIDDLE, position + BOX, split, "x_1", WHOLE_SHAPE),
        f'<circle cx="{MIDDLE:g}" cy="{position + BOX + 14}" r="3.2" fill="#424a53"/>',
        flow((MIDDLE, position + BOX + 14), (RAIL, position + BOX + 14), (RAIL, fuse + BOX / 2),
             (LEFT, fuse + BOX / 2)),
        text(RAIL + 10, fuse + BOX / 2 - 9, "x_1", "soft"),
        step(2, "1×1 convolution, channels split in two", "[y_g, y_l] = Conv1×1(BN(x_1))",
             LEFT, split, whole),
        tensor(LOCAL, fork, aside, "y_l", LOCAL_SHAPE),
        step(3, "depthwise_conv3x3", "f = y_l + DW3(BN(y_l))", LEFT, aside, STREAM),
        tensor(LOCAL, aside + BOX, align, "f", LOCAL_SHAPE),
        tensor(GLOBAL, fork, down, "y_g", LOCAL_SHAPE),
        step(4, "bilinear downsampling", f"g_0: {COARSE}×{COARSE} tokens of y_g",
             RIGHT - STREAM, down, STREAM),
        tensor(GLOBAL, down + BOX, attend, "g_0", GLOBAL_SHAPE),
        step(5, "global_attention", "g_1 = g_0 + MHSA(LN(g_0))", RIGHT - STREAM, attend, STREAM),
        tensor(GLOBAL, attend + BOX, align, "g_1", GLOBAL_SHAPE),
        co_attention(align, align_height),
        tensor(LOCAL, align + align_height, fuse, "f′", LOCAL_SHAPE),
        tensor(GLOBAL, align + align_height, fuse, "g′", GLOBAL_SHAPE),
        step(7, "upsample_concat", "x_2 = x_1 + Conv1×1(concat[f′, bilinear(g′)])",
             LEFT, fuse, whole),
        tensor(MIDDLE, fuse + BOX, mlp, "x_2", WHOLE_SHAPE),
        step(8, "pointwise_mlp",
             f"x_3 = x_2 + Conv1×1(GELU(Conv1×1(BN(x_2)))), {CHANNELS} → {hidden} → {CHANNELS}",
             LEFT, mlp, whole),
        tensor(MIDDLE, mlp + BOX, end, "x_3", WHOLE_SHAPE),
        legend(end + 38),
    ]  # fmt: skip
    body = "\n".join(parts)
    height = end + 38 + 2 * 28 + 30
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" \
width="{WIDTH}" height="{height}" role="img" aria-labelledby="title description">
<title id="title">{TITLE}</title>
<desc id="description">{DESCRIPTION}</desc>
<style>{STYLE}</style>
<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8.5" refY="4" orient="auto" \
markerUnits="userSpaceOnUse"><path d="M 0 0 L 9 4 L 0 8 z" fill="#424a53"/></marker></defs>
{box(1, 1, WIDTH - 2, height - 2, "panel", radius=12)}
{body}
</svg>
"""


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
