//! Charts as SVG: lines over two axes, and bars. The colours follow the reader's light or dark scheme; the background
//! is drawn, so that they are readable on any page.

use std::fmt::Write;

const WIDTH: f64 = 800.0;
const TOP: f64 = 84.0;
const FONT: &str = "font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\"";
const STYLE: &str = "<style>
.ground{fill:#ffffff;stroke:#d0d7de}.text{fill:#1f2328}.soft{fill:#59636e}.grid{stroke:#e4e8ec}.axis{stroke:#8c959f}
.line{fill:none;stroke-width:2.5;stroke-linejoin:round;stroke-linecap:round}
.f0{fill:#1f6feb}.f1{fill:#6e7781}.f2{fill:#cf5c0a}.f3{fill:#1a7f37}.f4{fill:#8250df}.f5{fill:#bf3989}.f6{fill:#79b0ff}
.l0{stroke:#1f6feb}.l1{stroke:#6e7781}.l2{stroke:#cf5c0a}.l3{stroke:#1a7f37}.l4{stroke:#8250df}.l5{stroke:#bf3989}.l6{stroke:#79b0ff}
@media (prefers-color-scheme:dark){
.ground{fill:#0d1117;stroke:#30363d}.text{fill:#e6edf3}.soft{fill:#9198a1}.grid{stroke:#21262d}.axis{stroke:#656c76}
.f0{fill:#58a6ff}.f1{fill:#9198a1}.f2{fill:#f0883e}.f3{fill:#3fb950}.f4{fill:#bc8cff}.f5{fill:#f778ba}.f6{fill:#2f6fc4}
.l0{stroke:#58a6ff}.l1{stroke:#9198a1}.l2{stroke:#f0883e}.l3{stroke:#3fb950}.l4{stroke:#bc8cff}.l5{stroke:#f778ba}.l6{stroke:#2f6fc4}}
</style>";

/// The scale of an axis.
#[derive(Clone, Copy)]
pub(crate) enum Scale {
    Linear,
    Log,
    /// Shares in percent: 90, 99 and 99.9 have equal distances.
    Nines,
}

impl Scale {
    fn place(self, value: f64) -> f64 {
        match self {
            Scale::Linear => value,
            Scale::Log => value.log10(),
            Scale::Nines => -(1.0 - value / 100.0).max(1e-6).log10(),
        }
    }
}

pub(crate) struct Axis {
    pub label: String,
    pub scale: Scale,
    pub from: f64,
    pub to: f64,
    /// Positions and their labels.
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// The position of a value, from 0 to 1.
    fn share(&self, value: f64) -> f64 {
        let (from, to) = (self.scale.place(self.from), self.scale.place(self.to));
        ((self.scale.place(value) - from) / (to - from)).clamp(0.0, 1.0)
    }
}

/// The colour: the relay's, the lower bound's, a rival's...
#[derive(Clone, Copy)]
pub(crate) struct Colour(pub usize);

pub(crate) struct Line {
    pub name: String,
    pub colour: Colour,
    pub points: Vec<(f64, f64)>,
    /// A dot at each point.
    pub dots: bool,
}

pub(crate) struct Bar {
    pub name: String,
    pub colour: Colour,
    pub value: f64,
    pub text: String,
}

/// Lines over two axes, each with its name at its end.
pub(crate) fn lines(title: &str, subtitle: &str, x: &Axis, y: &Axis, lines: &[Line]) -> String {
    const HEIGHT: f64 = 420.0;
    let (left, right, top, bottom) = (84.0, WIDTH - 190.0, TOP + 14.0, HEIGHT - 58.0);
    let at_x = |value: f64| left + x.share(value) * (right - left);
    let at_y = |value: f64| bottom - y.share(value) * (bottom - top);
    let mut svg = begin(title, subtitle, HEIGHT);
    for (value, text) in &y.ticks {
        let at = at_y(*value);
        put(
            &mut svg,
            format_args!("<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>"),
        );
        label(&mut svg, left - 10.0, at + 4.5, "end", "soft", 13.0, text);
    }
    for (value, text) in &x.ticks {
        let at = at_x(*value);
        put(
            &mut svg,
            format_args!("<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>"),
        );
        label(&mut svg, at, bottom + 20.0, "middle", "soft", 13.0, text);
    }
    put(
        &mut svg,
        format_args!("<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>"),
    );
    label(
        &mut svg,
        (left + right) / 2.0,
        HEIGHT - 16.0,
        "middle",
        "soft",
        13.0,
        &x.label,
    );
    label(&mut svg, 24.0, top - 16.0, "start", "soft", 13.0, &y.label);

    for line in lines {
        let colour = line.colour.0;
        let points: Vec<String> = line
            .points
            .iter()
            .map(|(a, b)| format!("{:.1},{:.1}", at_x(*a), at_y(*b)))
            .collect();
        put(
            &mut svg,
            format_args!("<polyline class=\"line l{colour}\" points=\"{}\"/>", points.join(" ")),
        );
        for (a, b) in line.points.iter().filter(|_| line.dots) {
            let (cx, cy) = (at_x(*a), at_y(*b));
            put(
                &mut svg,
                format_args!("<circle class=\"f{colour}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"5\"/>"),
            );
        }
    }
    // From the lowest up, each name clear of the one below.
    let ends = lines.iter().filter_map(|line| Some((line, line.points.last()?)));
    let mut names: Vec<(f64, &Line)> = ends.map(|(line, end)| (at_y(end.1), line)).collect();
    names.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut below = f64::MAX;
    for (at, line) in names {
        below = at.min(below - 19.0);
        let class = format!("f{}", line.colour.0);
        label(&mut svg, right + 12.0, below + 4.5, "start", &class, 13.0, &line.name);
    }
    end(svg)
}

/// Horizontal bars with their values.
pub(crate) fn bars(title: &str, subtitle: &str, bars: &[Bar]) -> String {
    const ROW: f64 = 38.0;
    let (left, right) = (250.0, WIDTH - 110.0);
    let most = bars.iter().map(|bar| bar.value).fold(1.0, f64::max);
    let mut svg = begin(title, subtitle, TOP + bars.len() as f64 * ROW + 10.0);
    for (row, bar) in bars.iter().enumerate() {
        let y = TOP - 8.0 + row as f64 * ROW;
        let width = (bar.value / most * (right - left)).max(2.0);
        label(&mut svg, left - 12.0, y + 19.0, "end", "text", 14.0, &bar.name);
        put(
            &mut svg,
            format_args!(
                "<rect class=\"f{}\" x=\"{left}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"26\" rx=\"3\"/>",
                bar.colour.0
            ),
        );
        label(
            &mut svg,
            left + width + 10.0,
            y + 19.0,
            "start",
            "text",
            14.0,
            &bar.text,
        );
    }
    end(svg)
}

fn begin(title: &str, subtitle: &str, height: f64) -> String {
    let mut svg = String::new();
    put(
        &mut svg,
        format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\" aria-label=\"{}\" {FONT}>\n{STYLE}\n<rect class=\"ground\" x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"8\"/>",
            escape(title),
            WIDTH - 1.0,
            height - 1.0
        ),
    );
    put(&mut svg, format_args!("<g font-weight=\"600\">"));
    label(&mut svg, 24.0, 32.0, "start", "text", 18.0, title);
    put(&mut svg, format_args!("</g>"));
    label(&mut svg, 24.0, 54.0, "start", "soft", 13.0, subtitle);
    svg
}

fn end(mut svg: String) -> String {
    svg.push_str("</svg>\n");
    svg
}

fn label(svg: &mut String, x: f64, y: f64, anchor: &str, class: &str, size: f64, text: &str) {
    put(
        svg,
        format_args!(
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\">{}</text>",
            escape(text)
        ),
    );
}

fn put(svg: &mut String, what: std::fmt::Arguments) {
    svg.write_fmt(what).expect("a string takes it");
    svg.push('\n');
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}
