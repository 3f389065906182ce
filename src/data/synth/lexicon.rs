//! Invented words: spelt from syllables by the seed, shorter for more frequent ranks, every form unique.

use std::collections::HashMap;

use super::draw::Random;

pub(super) const NOUNS: usize = 400;
pub(super) const VERBS: usize = 200;
pub(super) const ADJECTIVES: usize = 120;
pub(super) const ADVERBS: usize = 40;
pub(super) const NAMES: usize = 60;
pub(super) const TOWNS: usize = 40;
pub(super) const LANDS: usize = 12;

/// Grammatical number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Number {
    Singular,
    Plural,
}

/// One lexical token of a document: a word's class and rank in it, or a function word or mark by its spelling.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Word {
    Noun(usize, Number),
    Verb(usize, Number),
    Adjective(usize),
    Adverb(usize),
    Name(usize),
    Town(usize),
    Land(usize),
    Plain(&'static str),
}

/// Function words; content words never look like one of these.
const FUNCTION_WORDS: [&str; 30] = [
    "tales", "of", "is", "a", "from", "and", "with", "the", "every", "some", "many", "he", "she", "it", "they", "his",
    "her", "that", "which", "near", "under", "behind", "beside", "above", "beyond", "in", "while", "because", "no",
    "few",
];

/// All spellings, and their inverse.
pub(super) struct Lexicon {
    nouns: Vec<[String; 2]>,
    verbs: Vec<[String; 2]>,
    adjectives: Vec<String>,
    adverbs: Vec<String>,
    names: Vec<String>,
    towns: Vec<String>,
    lands: Vec<String>,
    /// From the spelling in lower case.
    words: HashMap<String, Word>,
}

impl Lexicon {
    pub(super) fn new(random: &mut Random) -> Self {
        let plain = [".", ",", "\n"].into_iter().chain(FUNCTION_WORDS).map(|s| (s.to_string(), Word::Plain(s)));
        let mut speller = Speller { random, words: plain.collect() };
        use Number::{Plural, Singular};
        let nouns = speller.inflected(NOUNS, |i| [("", Word::Noun(i, Singular)), ("s", Word::Noun(i, Plural))]);
        let verbs = speller.inflected(VERBS, |i| [("s", Word::Verb(i, Singular)), ("", Word::Verb(i, Plural))]);
        let adjectives = speller.plain(ADJECTIVES, 2, &[""], Word::Adjective);
        let adverbs = speller.plain(ADVERBS, 1, &["ly"], Word::Adverb);
        let mut names = speller.plain(NAMES, 1, &["a", "o", "i", "en", "is"], Word::Name);
        let mut towns = speller.plain(TOWNS, 1, &["ton", "ford", "by", "ham"], Word::Town);
        let mut lands = speller.plain(LANDS, 1, &["land", "mark", "ia"], Word::Land);
        for proper in [&mut names, &mut towns, &mut lands].into_iter().flatten() {
            proper[..1].make_ascii_uppercase();
        }
        Self { nouns, verbs, adjectives, adverbs, names, towns, lands, words: speller.words }
    }

    /// The spelling inside a sentence.
    pub(super) fn spell(&self, word: Word) -> &str {
        match word {
            Word::Noun(i, number) => &self.nouns[i][number as usize],
            Word::Verb(i, number) => &self.verbs[i][number as usize],
            Word::Adjective(i) => &self.adjectives[i],
            Word::Adverb(i) => &self.adverbs[i],
            Word::Name(i) => &self.names[i],
            Word::Town(i) => &self.towns[i],
            Word::Land(i) => &self.lands[i],
            Word::Plain(spelling) => spelling,
        }
    }

    /// Splits a text into words and marks, whatever its spacing and capitals; None at something unknown.
    pub(super) fn words(&self, text: &str) -> Option<Vec<Word>> {
        let mut words = Vec::new();
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
            let (piece, tail) = rest.split_at(letters.max(first.len_utf8()));
            if piece != " " {
                words.push(*self.words.get(&piece.to_ascii_lowercase())?);
            }
            rest = tail;
        }
        Some(words)
    }
}

/// Makes new spellings and enters them into the inverse map.
struct Speller<'a> {
    random: &'a mut Random,
    words: HashMap<String, Word>,
}

impl Speller<'_> {
    /// `n` words with the two inflected forms that `forms` gives. The most frequent eighth has one syllable, the last
    /// third has three.
    fn inflected(&mut self, n: usize, forms: impl Fn(usize) -> [(&'static str, Word); 2]) -> Vec<[String; 2]> {
        let syllables = |rank| match rank * 24 / n {
            0..3 => 1,
            3..16 => 2,
            _ => 3,
        };
        (0..n).map(|rank| self.unique(syllables(rank), forms(rank))).collect()
    }

    /// `n` words of one form each: a stem of so many syllables and one of the `endings`.
    fn plain(
        &mut self,
        n: usize,
        syllables: usize,
        endings: &[&'static str],
        word: impl Fn(usize) -> Word,
    ) -> Vec<String> {
        let mut spellings = Vec::with_capacity(n);
        for rank in 0..n {
            let ending = endings[self.random.below(endings.len())];
            let [spelling] = self.unique(syllables, [(ending, word(rank))]);
            spellings.push(spelling);
        }
        spellings
    }

    /// Tries stems until no form is taken.
    fn unique<const N: usize>(&mut self, syllables: usize, forms: [(&'static str, Word); N]) -> [String; N] {
        loop {
            let stem = self.stem(syllables);
            let spellings = forms.map(|(ending, _)| format!("{stem}{ending}"));
            if spellings.iter().all(|spelling| !self.words.contains_key(spelling)) {
                self.words.extend(spellings.iter().cloned().zip(forms.map(|(_, word)| word)));
                return spellings;
            }
        }
    }

    /// "grem", "talin", "roviden": begins with a consonant, so that the article is always "a", and ends in one other than
    /// s, so that inflection shows. No k and g inside, which spares most of the rude words.
    fn stem(&mut self, syllables: usize) -> String {
        const CLUSTERS: [&str; 16] =
            ["br", "cl", "dr", "fl", "gr", "pl", "pr", "sh", "sl", "st", "th", "tr", "ch", "sw", "gl", "cr"];
        const CONSONANTS: [&str; 13] = ["b", "d", "f", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w"];
        const VOWELS: [&str; 5] = ["a", "e", "i", "o", "u"];
        const CODAS: [&str; 12] = ["l", "m", "n", "r", "d", "t", "nd", "rn", "lt", "mp", "rk", "lm"];
        let mut pick = |parts: &[&'static str]| parts[self.random.below(parts.len())];
        if syllables == 1 {
            return [pick(&CLUSTERS), pick(&VOWELS), pick(&CODAS)].concat();
        }
        let open: String = (1..syllables).flat_map(|_| [pick(&CONSONANTS), pick(&VOWELS)]).collect();
        // Single consonants only: the first six.
        [open.as_str(), pick(&CONSONANTS), pick(&VOWELS), pick(&CODAS[..6])].concat()
    }
}
