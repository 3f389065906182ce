use super::*;

/// Checks that tags nest and close, attributes are quoted and no bare `&` or `<` stands in text.
fn well_formed(xml: &str) -> Result<(), String> {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = xml.trim();
    while let Some(start) = rest.find('<') {
        let (text, from) = rest.split_at(start);
        if text.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "").replace("&quot;", "").contains(['&', '>'])
        {
            return Err(format!("text {text:?}"));
        }
        let end = from.find('>').ok_or("an open tag")?;
        let (tag, after) = (&from[1..end], &from[end + 1..]);
        let name = tag.trim_matches('/').split_whitespace().next().unwrap_or_default();
        if tag.matches('"').count() % 2 != 0 || tag.contains('<') {
            return Err(format!("tag <{tag}>"));
        }
        match (tag.starts_with('/'), tag.ends_with('/')) {
            (true, _) => match open.pop() {
                Some(expected) if expected == name => {}
                expected => return Err(format!("</{name}> closes {expected:?}")),
            },
            (false, true) => {}
            (false, false) => open.push(name),
        }
        if open.is_empty() && !after.is_empty() {
            return Err("text after the root".into());
        }
        rest = after;
    }
    if open.is_empty() { Ok(()) } else { Err(format!("{open:?} stay open")) }
}

fn falling(n: usize) -> Vec<(f64, f64)> {
    (0..n)
        .map(|i| (i as f64 * 1000.0, 3.0 + 6.0 * (-(i as f64) * 40.0 / n as f64).exp() + 0.5 / (1.0 + i as f64)))
        .collect()
}

fn sample() -> Chart {
    Chart {
        title: "Loss & <tokens>".into(),
        x_label: "tokens".into(),
        y_label: "nats per token".into(),
        series: vec![
            Series::new("base \"small\"", 0, Style::Solid, falling(2000)),
            Series::new("widened", 1, Style::Dashed, falling(30)),
            Series::horizontal("entropy floor", 2.75),
        ],
        ..Chart::default()
    }
}

#[test]
fn the_checker_finds_bad_xml() {
    for bad in ["<a><b></a></b>", "<a>", "<a>&</a>", "<a b=\"c></a>", "<a/><b/>"] {
        assert!(well_formed(bad).is_err(), "{bad}");
    }
    well_formed("<a b=\"c\"><d/>x &lt; y</a>").unwrap();
}

#[test]
fn a_picture_is_well_formed_and_has_all_its_parts() {
    let svg = render(&[sample(), Chart { title: "second".into(), ..sample() }]);
    well_formed(&svg).unwrap();
    for text in
        ["Loss &amp; &lt;tokens&gt;", "base &quot;small&quot;", "widened", "entropy floor", ">second<", ">1.0 M<"]
    {
        assert!(svg.contains(text), "{text} is missing");
    }
    assert_eq!(svg.matches("<polyline").count(), 4);
    assert!(svg.contains(PALETTE[0]) && svg.contains(PALETTE[1]) && svg.contains("stroke-dasharray=\"6 4\""));
}

#[test]
fn charts_without_points_or_with_odd_ones_are_well_formed_and_finite() {
    let odd = vec![(f64::NAN, 1.0), (1.0, f64::INFINITY), (-1.0, 2.0), (5.0, 0.0)];
    let single = vec![(10.0, 2.0)];
    for points in [Vec::new(), odd, single] {
        for log in [false, true] {
            let series = vec![Series::new("s", 9, Style::Solid, points.clone()), Series::horizontal("h", 2.0)];
            let svg = render(&[Chart { x_log: log, y_log: log, series, ..Chart::default() }]);
            well_formed(&svg).unwrap();
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
    well_formed(&render(&[])).unwrap();
}

#[test]
fn long_lines_become_means_that_keep_the_whole() {
    let points: Vec<(f64, f64)> = (0..1234).map(|i| (i as f64, (i % 2) as f64)).collect();
    let thinned = thin(&points);
    assert_eq!(thinned.len(), MOST_POINTS);
    assert!(thinned.is_sorted_by(|a, b| a.0 < b.0));
    let mean = thinned.iter().map(|p| p.1).sum::<f64>() / MOST_POINTS as f64;
    assert!((mean - 0.5).abs() < 0.01, "{mean}");
    assert!(thinned[0].0 < 5.0 && thinned[MOST_POINTS - 1].0 > 1228.0);
    assert!(thin(&points[..MOST_POINTS]) == points[..MOST_POINTS], "a short line was changed");
}

#[test]
fn a_steep_start_is_cut_off_but_not_on_a_logarithmic_axis() {
    let panel = |x_log| {
        let chart = Chart { x_log, ..sample() };
        Panel::new(&chart, 0.0).y
    };
    assert!(panel(false).fraction(9.0) > 1.5, "9 nats at the start should be far above the picture");
    assert!((0.5..1.0).contains(&panel(true).fraction(8.0)));
    for axis in [panel(false), panel(true)] {
        assert!((0.0..0.2).contains(&axis.fraction(2.75)), "the floor must be visible");
    }
}

#[test]
fn a_line_without_a_steep_start_is_shown_whole() {
    let points: Vec<(f64, f64)> = (0..100).map(|i| (i as f64, i as f64)).collect();
    let chart = Chart { series: vec![Series::new("s", 0, Style::Solid, points)], ..Chart::default() };
    let panel = Panel::new(&chart, 0.0);
    assert!(panel.y.fraction(0.0) > 0.0 && panel.y.fraction(99.0) < 1.0);
    assert_eq!((panel.x.fraction(0.0), panel.x.fraction(99.0)), (0.0, 1.0));
}
