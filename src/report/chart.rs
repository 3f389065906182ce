//! Line charts as one self-contained SVG: no script, no font file, nothing fetched.
//!
//! Drawn on a white card, so that it reads on light and dark pages alike. Colours are those of Okabe and Ito
//! (jfly.uni-koeln.de/color), which people with any kind of colour vision can tell apart.

use std::fmt::Write;

use super::axis::Axis;

/// Blue, vermillion, bluish green, reddish purple, orange, sky blue.
const PALETTE: [&str; 6] = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const TEXT: &str = "#24292f";
const MUTED: &str = "#57606a";
const GRID: &str = "#e4e8ec";

/// A line has at most this many points, about one for two pixels; more are averaged.
const MOST_POINTS: usize = 200;
/// A line of at most this many points shows each as a dot.
const MOST_DOTS: usize = 40;

/// Sizes in pixels.
const PANEL: f64 = 500.0;
const PLOT_HEIGHT: f64 = 270.0;
const LEFT: f64 = 66.0;
const RIGHT: f64 = 22.0;
const TITLE: f64 = 44.0;
const LEGEND_ROW: f64 = 19.0;
const LEGEND_COLUMNS: usize = 2;
const BOTTOM: f64 = 56.0;
/// Radius.
const DOT: f64 = 2.5;

/// One panel.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// Above the panel.
    pub title: String,
    /// Under the horizontal axis.
    pub x_label: String,
    /// Beside the vertical axis.
    pub y_label: String,
    /// Logarithmic horizontal axis; points at or below zero are left out.
    pub x_log: bool,
    /// Logarithmic vertical axis; points at or below zero are left out.
    pub y_log: bool,
    /// The lines, the last on top.
    pub series: Vec<Series>,
}

/// A line.
#[derive(Clone, Debug)]
pub struct Series {
    /// For the legend.
    pub name: String,
    /// Index into a palette of six; the same index is the same colour in every panel.
    pub color: usize,
    /// Solid, dashed or horizontal.
    pub style: Style,
    /// Points (x, y) by rising x; those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// How a line is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// A full line.
    Solid,
    /// A dashed line.
    Dashed,
    /// A grey line over the whole width at the first point's y: a bound or a goal.
    Horizontal,
}

impl Series {
    /// A line through `points`.
    pub fn new(name: impl Into<String>, color: usize, style: Style, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), color, style, points }
    }

    /// A grey line at `y`.
    pub fn horizontal(name: impl Into<String>, y: f64) -> Self {
        Self::new(name, 0, Style::Horizontal, vec![(0.0, y)])
    }

    /// Presentation attributes of the stroke.
    fn stroke(&self) -> String {
        let color = PALETTE[self.color % PALETTE.len()];
        match self.style {
            Style::Solid => format!(r#"stroke="{color}" stroke-width="1.8""#),
            Style::Dashed => format!(r#"stroke="{color}" stroke-width="1.8" stroke-dasharray="6 4""#),
            Style::Horizontal => format!(r#"stroke="{MUTED}" stroke-width="1.5" stroke-dasharray="2 3""#),
        }
    }
}

/// The panels side by side as an SVG document.
pub fn render(charts: &[Chart]) -> String {
    let rows = charts.iter().map(|c| c.series.len().div_ceil(LEGEND_COLUMNS)).max().unwrap_or(0);
    let top = TITLE + rows as f64 * LEGEND_ROW + 8.0;
    let (width, height) = (PANEL * charts.len() as f64, top + PLOT_HEIGHT + BOTTOM);
    let name = charts.iter().map(|c| escape(&c.title)).collect::<Vec<_>>().join("; ");
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" "#
    );
    svg += r#"role="img" font-family="system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif" "#;
    line(&mut svg, format_args!(r#"font-size="12" fill="{TEXT}" aria-label="{name}">"#));
    line(&mut svg, format_args!(r#"<rect width="{width}" height="{height}" rx="8" fill="white"/>"#));
    for (i, chart) in charts.iter().enumerate() {
        line(&mut svg, format_args!(r#"<g transform="translate({} 0)">"#, PANEL * i as f64));
        Panel::new(chart, top).draw(&mut svg);
        line(&mut svg, format_args!("</g>"));
    }
    line(&mut svg, format_args!("</svg>"));
    svg
}

/// A chart with its scales.
struct Panel<'a> {
    chart: &'a Chart,
    /// Points that can be drawn, for each series.
    lines: Vec<Vec<(f64, f64)>>,
    x: Axis,
    y: Axis,
    /// Distance from the top of the picture to the plot.
    top: f64,
}

impl<'a> Panel<'a> {
    fn new(chart: &'a Chart, top: f64) -> Self {
        let drawable = |(x, y): &(f64, f64), style| {
            (x.is_finite() && (!chart.x_log || *x > 0.0) || style == Style::Horizontal)
                && y.is_finite()
                && (!chart.y_log || *y > 0.0)
        };
        let lines: Vec<Vec<(f64, f64)>> = chart
            .series
            .iter()
            .map(|s| thin(&s.points.iter().copied().filter(|p| drawable(p, s.style)).collect::<Vec<_>>()))
            .collect();
        let (x, y) = (x_axis(chart, &lines), y_axis(chart, &lines));
        Self { chart, lines, x, y, top }
    }

    /// Pixels from the plot's left edge.
    fn px(&self, x: f64) -> f64 {
        self.x.fraction(x) * (PANEL - LEFT - RIGHT)
    }

    /// Pixels from the plot's top edge.
    fn py(&self, y: f64) -> f64 {
        (1.0 - self.y.fraction(y)) * PLOT_HEIGHT
    }

    fn draw(&self, svg: &mut String) {
        let title = escape(&self.chart.title);
        line(svg, format_args!(r#"<text x="{LEFT}" y="28" font-size="15" font-weight="600">{title}</text>"#));
        self.draw_legend(svg);
        self.draw_axes(svg);
        self.draw_lines(svg);
    }

    fn draw_legend(&self, svg: &mut String) {
        let column = (PANEL - LEFT - RIGHT) / LEGEND_COLUMNS as f64;
        for (i, series) in self.chart.series.iter().enumerate() {
            let x = LEFT + column * (i % LEGEND_COLUMNS) as f64;
            let y = TITLE + 10.0 + LEGEND_ROW * (i / LEGEND_COLUMNS) as f64;
            let (end, stroke) = (x + 26.0, series.stroke());
            line(svg, format_args!(r#"<path d="M{x} {y}H{end}" {stroke}/>"#));
            let name = escape(&series.name);
            line(svg, format_args!(r#"<text x="{}" y="{}">{name}</text>"#, end + 7.0, y + 4.0));
        }
    }

    fn draw_axes(&self, svg: &mut String) {
        let (top, bottom, right) = (self.top, self.top + PLOT_HEIGHT, PANEL - RIGHT);
        for (value, label) in self.y.ticks() {
            let y = top + self.py(value);
            line(svg, format_args!(r#"<path d="M{LEFT} {y:.1}H{right}" stroke="{GRID}"/>"#));
            let (x, y) = (LEFT - 8.0, y + 4.0);
            line(svg, format_args!(r#"<text x="{x}" y="{y:.1}" text-anchor="end" fill="{MUTED}">{label}</text>"#));
        }
        for (value, label) in self.x.ticks() {
            let x = LEFT + self.px(value);
            line(svg, format_args!(r#"<path d="M{x:.1} {top}V{bottom}" stroke="{GRID}"/>"#));
            let y = bottom + 18.0;
            line(svg, format_args!(r#"<text x="{x:.1}" y="{y}" text-anchor="middle" fill="{MUTED}">{label}</text>"#));
        }
        line(svg, format_args!(r#"<path d="M{LEFT} {top}V{bottom}H{right}" fill="none" stroke="{MUTED}"/>"#));
        let (x, y) = ((LEFT + right) / 2.0, bottom + 40.0);
        let (x_label, y_label) = (escape(&self.chart.x_label), escape(&self.chart.y_label));
        line(svg, format_args!(r#"<text x="{x}" y="{y}" text-anchor="middle">{x_label}</text>"#));
        let (x, y) = (16.0, (top + bottom) / 2.0);
        let turned = format!(r#"transform="rotate(-90 {x} {y})""#);
        line(svg, format_args!(r#"<text x="{x}" y="{y}" {turned} text-anchor="middle">{y_label}</text>"#));
    }

    /// The lines, in an inner `svg` that cuts off what lies outside the plot, but for a dot's width at its sides.
    fn draw_lines(&self, svg: &mut String) {
        let width = PANEL - LEFT - RIGHT;
        let (x, wide) = (LEFT - DOT, width + 2.0 * DOT);
        let window = format!(r#"viewBox="-{DOT} 0 {wide} {PLOT_HEIGHT}" overflow="hidden""#);
        line(svg, format_args!(r#"<svg x="{x}" y="{}" width="{wide}" height="{PLOT_HEIGHT}" {window}>"#, self.top));
        for (series, points) in self.chart.series.iter().zip(&self.lines) {
            let Some(first) = points.first() else { continue };
            let stroke = series.stroke();
            if series.style == Style::Horizontal {
                line(svg, format_args!(r#"<path d="M0 {:.1}H{width}" {stroke}/>"#, self.py(first.1)));
                continue;
            }
            let path = points.iter().map(|(x, y)| format!("{:.1},{:.1}", self.px(*x), self.py(*y)));
            line(
                svg,
                format_args!(r#"<polyline points="{}" fill="none" {stroke}/>"#, path.collect::<Vec<_>>().join(" ")),
            );
            if points.len() <= MOST_DOTS {
                let color = PALETTE[series.color % PALETTE.len()];
                for (x, y) in points {
                    let (x, y) = (self.px(*x), self.py(*y));
                    line(svg, format_args!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="{DOT}" fill="{color}"/>"#));
                }
            }
        }
        line(svg, format_args!("</svg>"));
        if self.lines.iter().all(Vec::is_empty) {
            let (x, y) = (LEFT + width / 2.0, self.top + PLOT_HEIGHT / 2.0);
            line(svg, format_args!(r#"<text x="{x}" y="{y}" text-anchor="middle">no data</text>"#));
        }
    }
}

/// From the first x to the last; a linear axis starts at zero where that costs little room.
fn x_axis(chart: &Chart, lines: &[Vec<(f64, f64)>]) -> Axis {
    let curves = chart.series.iter().zip(lines).filter(|(s, _)| s.style != Style::Horizontal);
    let xs = curves.flat_map(|(_, points)| points.iter().map(|p| p.0));
    let (low, high) = extent(xs).unwrap_or((1.0, 10.0));
    let from_zero = !chart.x_log && low > 0.0 && low < high / 4.0;
    Axis::new(if from_zero { 0.0 } else { low }, high, chart.x_log)
}

/// All values, but for the first part of curves that fall (or rise) so fast at their start that they would press
/// the rest flat: then each curve counts from its first tenth on. A logarithmic x shows a start well, so it is kept.
fn y_axis(chart: &Chart, lines: &[Vec<(f64, f64)>]) -> Axis {
    let ys = |skip_tenths: usize| {
        let kept = lines.iter().flat_map(move |points| &points[points.len() * skip_tenths / 10..]);
        extent(kept.map(|p| p.1))
    };
    let whole = ys(0).unwrap_or((1.0, 10.0));
    let settled = ys(1).unwrap_or(whole);
    let flat = whole.1 - whole.0 > 1.5 * (settled.1 - settled.0);
    let (low, high) = if flat && !chart.x_log { settled } else { whole };
    Axis::new(low, high, chart.y_log).padded(0.05)
}

/// Smallest and largest.
fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |range, v| Some(range.map_or((v, v), |(low, high): (f64, f64)| (low.min(v), high.max(v)))))
}

/// At most [`MOST_POINTS`] points: means over runs of neighbours of nearly equal length.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let buckets = points.len().min(MOST_POINTS);
    let mean = |bucket: &[(f64, f64)]| {
        let (x, y) = bucket.iter().fold((0.0, 0.0), |(x, y), p| (x + p.0, y + p.1));
        (x / bucket.len() as f64, y / bucket.len() as f64)
    };
    (0..buckets).map(|i| mean(&points[points.len() * i / buckets..points.len() * (i + 1) / buckets])).collect()
}

/// Appends one line of SVG.
fn line(svg: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(svg, "{text}").expect("a string takes any text");
}

/// Text as XML content or attribute value; control characters, which XML cannot hold, are left out.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars().filter(|c| !c.is_control()) {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests;
