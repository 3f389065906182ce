//! The grammar, written once and run in two ways: [`Choices`] either draws each choice or reads it from the words ahead.
//!
//! Every choice is a draw from a [`Dist`] and is decided by the next few words, whatever was derived before: noun phrases
//! carry at most one modifier, adverbs stand before their verb, and "in" opens nothing but a sentence's place. So
//! reading has one possible answer, and the probability of a text is that of its one derivation.

use super::{
    draw::{Dist, Random},
    lexicon::{ADJECTIVES, ADVERBS, LANDS, NAMES, NOUNS, Number, TOWNS, VERBS, Word},
};
use Number::{Plural, Singular};
use Word::{Adjective, Adverb, Land, Name, Noun, Plain, Town, Verb};

/// Where the choices of a derivation come from. `None` ends the derivation: the text is none of the grammar's.
pub(super) trait Choices {
    /// One draw from `dist`; `read` tells the option from the words ahead (`None`: past the end).
    fn choose(&mut self, dist: &Dist, read: impl Fn(&dyn Fn(usize) -> Option<Word>) -> Option<usize>) -> Option<usize>;
    /// The next word of the text.
    fn say(&mut self, word: Word) -> Option<()>;
}

/// Prepositions that modify a noun.
const PREPOSITIONS: [&str; 6] = ["near", "under", "behind", "beside", "above", "beyond"];
/// Determiners and the number that they ask for.
const DETERMINERS: [(&str, Option<Number>); 7] = [
    ("the", None),
    ("a", Some(Singular)),
    ("some", Some(Plural)),
    ("every", Some(Singular)),
    ("many", Some(Plural)),
    ("no", Some(Singular)),
    ("few", Some(Plural)),
];
/// How a main clause goes on.
const CONTINUATIONS: [[&str; 2]; 4] = [[".", ""], [",", "and"], [",", "while"], [",", "because"]];
/// Names fall into this many groups by rank; the n-th character of a cast has a name of group n.
const CAST_MAX: usize = 3;
/// Noun phrases nest this deep.
const DEPTH_MAX: usize = 3;
/// A story ends after this many sentences at the latest.
const SENTENCES_MAX: usize = 40;

/// Every distribution of the grammar. "By" gives the index: the preference of each noun, verb, … over its partners.
pub(super) struct Tables {
    land: Dist,
    nouns_by_land: Vec<Dist>,
    towns_by_land: Vec<Dist>,
    /// [land · CAST_MAX + group], over the names of the group.
    names_by_land: Vec<Dist>,
    verbs_by_noun: Vec<Dist>,
    adjectives_by_noun: Vec<Dist>,
    prepositions_by_noun: Vec<Dist>,
    nouns_by_verb: Vec<Dist>,
    adverbs_by_verb: Vec<Dist>,
    nouns_by_preposition: Vec<Dist>,
    transitive: Vec<bool>,
    feminine: Vec<bool>,
    /// After 1, 2, … introductions: stop, or introduce one more.
    cast: Dist,
    /// Another sentence, or the end of the text.
    more: Dist,
    /// A noun phrase, a character, a pronoun; the last only where one can be resolved.
    subject: [Dist; 2],
    /// Which of 1, 2, … characters.
    member: [Dist; CAST_MAX],
    /// No apposition, or the trade and town of a character.
    apposition: Dist,
    /// A noun phrase, a character, or the subject's own possession; the last only for characters.
    object: [Dist; 2],
    determiner: Dist,
    number: Dist,
    adjective: Dist,
    adverb: Dist,
    /// By depth: nothing, a preposition, "that" (the noun is the subject), "which" (it is the object).
    modifier: [Dist; DEPTH_MAX],
    place: Dist,
    continuation: Dist,
}

impl Tables {
    pub(super) fn new(random: &mut Random) -> Self {
        let nouns = Dist::zipf(NOUNS, 8.0);
        let verbs = Dist::zipf(VERBS, 6.0);
        let adjectives = Dist::zipf(ADJECTIVES, 4.0);
        let mut tastes = |rows: usize, base: &Dist, count: usize, share: f64| -> Vec<Dist> {
            (0..rows).map(|_| Dist::taste(base, count, share, random)).collect()
        };
        Self {
            land: Dist::zipf(LANDS, 6.0),
            nouns_by_land: tastes(LANDS, &nouns, 40, 0.8),
            towns_by_land: tastes(LANDS, &Dist::zipf(TOWNS, 10.0), 5, 0.9),
            names_by_land: tastes(LANDS * CAST_MAX, &Dist::zipf(NAMES / CAST_MAX, 10.0), 6, 0.9),
            verbs_by_noun: tastes(NOUNS, &verbs, 6, 0.9),
            adjectives_by_noun: tastes(NOUNS, &adjectives, 5, 0.9),
            prepositions_by_noun: tastes(NOUNS, &Dist::zipf(PREPOSITIONS.len(), 4.0), 2, 0.8),
            nouns_by_verb: tastes(VERBS, &nouns, 12, 0.9),
            adverbs_by_verb: tastes(VERBS, &Dist::zipf(ADVERBS, 4.0), 3, 0.9),
            nouns_by_preposition: tastes(PREPOSITIONS.len(), &nouns, 30, 0.7),
            transitive: (0..VERBS).map(|_| random.uniform() < 0.75).collect(),
            feminine: (0..NAMES).map(|_| random.uniform() < 0.5).collect(),
            cast: Dist::new(&[0.35, 0.65]),
            more: Dist::new(&[0.9, 0.1]),
            subject: [Dist::new(&[0.5, 0.5]), Dist::new(&[0.4, 0.25, 0.35])],
            member: [Dist::new(&[1.0]), Dist::new(&[0.6, 0.4]), Dist::new(&[0.45, 0.33, 0.22])],
            apposition: Dist::new(&[0.6, 0.4]),
            object: [Dist::new(&[0.8, 0.2]), Dist::new(&[0.6, 0.1, 0.3])],
            determiner: Dist::new(&[0.45, 0.2, 0.1, 0.08, 0.07, 0.05, 0.05]),
            number: Dist::new(&[0.6, 0.4]),
            adjective: Dist::new(&[0.65, 0.35]),
            adverb: Dist::new(&[0.8, 0.2]),
            modifier: [
                Dist::new(&[0.66, 0.16, 0.1, 0.08]),
                Dist::new(&[0.78, 0.12, 0.05, 0.05]),
                Dist::new(&[0.88, 0.08, 0.02, 0.02]),
            ],
            place: Dist::new(&[0.85, 0.15]),
            continuation: Dist::new(&[0.7, 0.12, 0.1, 0.08]),
        }
    }
}

/// A named character and what the document said of it; later mentions repeat it without a draw.
struct Character {
    name: usize,
    trade: usize,
    town: usize,
    adjective: usize,
    possession: usize,
}

/// What a verb agrees with.
#[derive(Clone, Copy)]
struct Subject {
    /// The head noun; of a character, its trade: what one is decides what one does.
    noun: usize,
    number: Number,
    /// Index into the cast.
    character: Option<usize>,
}

/// One derivation in progress.
pub(super) struct Derivation<'a, C> {
    tables: &'a Tables,
    choices: &'a mut C,
    land: usize,
    cast: Vec<Character>,
    /// The character that "he" or "she" would mean: the subject of the last clause.
    focus: Option<usize>,
}

impl<'a, C: Choices> Derivation<'a, C> {
    /// A whole document.
    pub(super) fn document(tables: &'a Tables, choices: &'a mut C) -> Option<()> {
        let mut document = Self { tables, choices, land: 0, cast: Vec::with_capacity(CAST_MAX), focus: None };
        document.title()?;
        document.introductions()?;
        document.story()
    }

    /// "Tales of Shalia." The land colours the nouns, names and towns of the whole document.
    fn title(&mut self) -> Option<()> {
        self.say_all(&["tales", "of"])?;
        self.land = self.choices.choose(&self.tables.land, |ahead| match ahead(0)? {
            Land(land) => Some(land),
            _ => None,
        })?;
        self.choices.say(Land(self.land))?;
        self.say_all(&[".", "\n"])
    }

    /// "Swoma is a tenat from Proltby with vaton wehors." One to three of them.
    fn introductions(&mut self) -> Option<()> {
        loop {
            self.introduction()?;
            if self.cast.len() == CAST_MAX {
                break;
            }
            let more = |ahead: &dyn Fn(usize) -> Option<Word>| Some((ahead(0)? != Plain("\n")) as usize);
            if self.choices.choose(&self.tables.cast, more)? == 0 {
                break;
            }
        }
        self.choices.say(Plain("\n"))
    }

    fn introduction(&mut self) -> Option<()> {
        let tables = self.tables;
        let group = self.cast.len();
        let names = &tables.names_by_land[self.land * CAST_MAX + group];
        let in_group = self.choices.choose(names, |ahead| match ahead(0)? {
            Name(name) if name % CAST_MAX == group => Some(name / CAST_MAX),
            _ => None,
        })?;
        let name = in_group * CAST_MAX + group;
        self.choices.say(Name(name))?;
        self.say_all(&["is", "a"])?;
        let trade = self.noun(&tables.nouns_by_land[self.land])?;
        self.choices.say(Noun(trade, Singular))?;
        self.say_all(&["from"])?;
        let town = self.town()?;
        self.say_all(&["with"])?;
        let possession = self.noun(&tables.nouns_by_land[self.land])?;
        let adjective = self.adjective(possession)?;
        self.cast.push(Character { name, trade, town, adjective, possession });
        self.say_possession(group)?;
        self.say_all(&["."])
    }

    /// One sentence or more, up to the end of the text.
    fn story(&mut self) -> Option<()> {
        self.sentence()?;
        for _ in 1..SENTENCES_MAX {
            if self.choices.choose(&self.tables.more, |ahead| Some(ahead(0).is_none() as usize))? == 1 {
                break;
            }
            self.sentence()?;
        }
        Some(())
    }

    /// A main clause, perhaps with a place, perhaps with a second clause.
    fn sentence(&mut self) -> Option<()> {
        let subject = self.subject()?;
        self.predicate(subject, 0)?;
        let place = |ahead: &dyn Fn(usize) -> Option<Word>| Some((ahead(0)? == Plain("in")) as usize);
        if self.choices.choose(&self.tables.place, place)? == 1 {
            self.say_all(&["in"])?;
            self.town()?;
        }
        let continuation = self.choices.choose(&self.tables.continuation, |ahead| {
            let next = if ahead(0)? == Plain(",") { 1 } else { 0 };
            let word = ahead(next)?;
            CONTINUATIONS.iter().position(|words| Plain(words[next]) == word)
        })?;
        match continuation {
            0 => return self.say_all(&["."]),
            1 => {
                self.say_all(&CONTINUATIONS[1])?;
                self.choices.say(self.pronoun(subject))?;
                self.predicate(subject, 0)?;
            }
            other => {
                self.say_all(&CONTINUATIONS[other])?;
                let subject = self.subject()?;
                self.predicate(subject, 0)?;
            }
        }
        self.say_all(&["."])
    }

    /// The subject of a main clause, which becomes the focus if it is a character.
    fn subject(&mut self) -> Option<Subject> {
        let tables = self.tables;
        let kind = self.choices.choose(&tables.subject[self.focus.is_some() as usize], |ahead| match ahead(0)? {
            Name(_) => Some(1),
            Plain("he" | "she") => Some(2),
            _ => Some(0),
        })?;
        let character = match kind {
            0 => None,
            1 => Some(self.member()?),
            _ => self.focus,
        };
        self.focus = character;
        let Some(character) = character else {
            let (noun, number) = self.noun_phrase(&tables.nouns_by_land[self.land], 0)?;
            return Some(Subject { noun, number, character: None });
        };
        let subject = Subject { noun: self.cast[character].trade, number: Singular, character: Some(character) };
        if kind == 2 {
            self.choices.say(self.pronoun(subject))?;
        } else {
            self.apposition(character)?;
        }
        Some(subject)
    }

    /// ", the tenat from Proltby,": all of it known from the introduction.
    fn apposition(&mut self, character: usize) -> Option<()> {
        let comma = |ahead: &dyn Fn(usize) -> Option<Word>| Some((ahead(0)? == Plain(",")) as usize);
        if self.choices.choose(&self.tables.apposition, comma)? == 1 {
            let Character { trade, town, .. } = self.cast[character];
            self.say_all(&[",", "the"])?;
            self.choices.say(Noun(trade, Singular))?;
            self.say_all(&["from"])?;
            self.choices.say(Town(town))?;
            self.say_all(&[","])?;
        }
        Some(())
    }

    /// A verb that agrees with its subject and, if it takes one, its object.
    fn predicate(&mut self, subject: Subject, depth: usize) -> Option<()> {
        let tables = self.tables;
        let verb = self.verb(subject)?;
        if !tables.transitive[verb] {
            return Some(());
        }
        let kind =
            self.choices.choose(&tables.object[subject.character.is_some() as usize], |ahead| match ahead(0)? {
                Name(_) => Some(1),
                Plain("his" | "her") => Some(2),
                _ => Some(0),
            })?;
        match (kind, subject.character) {
            (2, Some(owner)) => {
                let possessive = if self.feminine(owner) { "her" } else { "his" };
                self.say_all(&[possessive])?;
                self.say_possession(owner)
            }
            (1, _) => self.member().map(drop),
            _ => self.noun_phrase(&tables.nouns_by_verb[verb], depth).map(drop),
        }
    }

    /// Perhaps an adverb, then the verb.
    fn verb(&mut self, subject: Subject) -> Option<usize> {
        let tables = self.tables;
        let verb = self.choices.choose(&tables.verbs_by_noun[subject.noun], |ahead| match (ahead(0)?, ahead(1)) {
            (Verb(verb, _), _) | (Adverb(_), Some(Verb(verb, _))) => Some(verb),
            _ => None,
        })?;
        if self.choices.choose(&tables.adverb, |ahead| Some(matches!(ahead(0)?, Adverb(_)) as usize))? == 1 {
            let adverb = self.choices.choose(&tables.adverbs_by_verb[verb], |ahead| match ahead(0)? {
                Adverb(adverb) => Some(adverb),
                _ => None,
            })?;
            self.choices.say(Adverb(adverb))?;
        }
        self.choices.say(Verb(verb, subject.number))?;
        Some(verb)
    }

    /// "the soval plers near a dadid": returns the head.
    fn noun_phrase(&mut self, nouns: &Dist, depth: usize) -> Option<(usize, Number)> {
        let tables = self.tables;
        let determiner = self.choices.choose(&tables.determiner, |ahead| {
            let word = ahead(0)?;
            DETERMINERS.iter().position(|(spelling, _)| Plain(spelling) == word)
        })?;
        let (spelling, number) = DETERMINERS[determiner];
        self.say_all(&[spelling])?;
        let noun = self.noun(nouns)?;
        let number = match number {
            Some(number) => number,
            None => self.number()?,
        };
        if self.choices.choose(&tables.adjective, |ahead| Some(matches!(ahead(0)?, Adjective(_)) as usize))? == 1 {
            let adjective = self.adjective(noun)?;
            self.choices.say(Adjective(adjective))?;
        }
        self.choices.say(Noun(noun, number))?;
        if depth < DEPTH_MAX {
            self.modifier(Subject { noun, number, character: None }, depth)?;
        }
        Some((noun, number))
    }

    /// Nothing, "near NP", "that VERB NP", "which NP VERB".
    fn modifier(&mut self, head: Subject, depth: usize) -> Option<()> {
        let tables = self.tables;
        let kind = self.choices.choose(&tables.modifier[depth], |ahead| match ahead(0) {
            Some(Plain("that")) => Some(2),
            Some(Plain("which")) => Some(3),
            Some(Plain(word)) if PREPOSITIONS.contains(&word) => Some(1),
            _ => Some(0),
        })?;
        match kind {
            0 => Some(()),
            1 => {
                let preposition = self.choices.choose(&tables.prepositions_by_noun[head.noun], |ahead| {
                    let word = ahead(0)?;
                    PREPOSITIONS.iter().position(|spelling| Plain(spelling) == word)
                })?;
                self.say_all(&[PREPOSITIONS[preposition]])?;
                self.noun_phrase(&tables.nouns_by_preposition[preposition], depth + 1).map(drop)
            }
            2 => {
                self.say_all(&["that"])?;
                self.predicate(head, depth + 1)
            }
            _ => {
                self.say_all(&["which"])?;
                let (noun, number) = self.noun_phrase(&tables.nouns_by_land[self.land], depth + 1)?;
                self.verb(Subject { noun, number, character: None }).map(drop)
            }
        }
    }

    /// A character of the cast, by name.
    fn member(&mut self) -> Option<usize> {
        let cast = &self.cast;
        let character = self.choices.choose(&self.tables.member[cast.len() - 1], |ahead| {
            let word = ahead(0)?;
            cast.iter().position(|character| Name(character.name) == word)
        })?;
        self.choices.say(Name(cast[character].name))?;
        Some(character)
    }

    /// Draws a noun without saying it: an adjective may come first.
    fn noun(&mut self, nouns: &Dist) -> Option<usize> {
        self.choices.choose(nouns, |ahead| match (ahead(0)?, ahead(1)) {
            (Noun(noun, _), _) | (Adjective(_), Some(Noun(noun, _))) => Some(noun),
            _ => None,
        })
    }

    /// Draws the number of the noun that comes next, behind its adjective.
    fn number(&mut self) -> Option<Number> {
        let plural = self.choices.choose(&self.tables.number, |ahead| match (ahead(0)?, ahead(1)) {
            (Noun(_, number), _) | (Adjective(_), Some(Noun(_, number))) => Some(number as usize),
            _ => None,
        })?;
        Some(if plural == 1 { Plural } else { Singular })
    }

    /// Draws an adjective for `noun` without saying it.
    fn adjective(&mut self, noun: usize) -> Option<usize> {
        self.choices.choose(&self.tables.adjectives_by_noun[noun], |ahead| match ahead(0)? {
            Adjective(adjective) => Some(adjective),
            _ => None,
        })
    }

    fn town(&mut self) -> Option<usize> {
        let town = self.choices.choose(&self.tables.towns_by_land[self.land], |ahead| match ahead(0)? {
            Town(town) => Some(town),
            _ => None,
        })?;
        self.choices.say(Town(town))?;
        Some(town)
    }

    fn say_possession(&mut self, owner: usize) -> Option<()> {
        let Character { adjective, possession, .. } = self.cast[owner];
        self.choices.say(Adjective(adjective))?;
        self.choices.say(Noun(possession, Plural))
    }

    fn feminine(&self, character: usize) -> bool {
        self.tables.feminine[self.cast[character].name]
    }

    fn pronoun(&self, subject: Subject) -> Word {
        Plain(match (subject.character, subject.number) {
            (Some(character), _) if self.feminine(character) => "she",
            (Some(_), _) => "he",
            (None, Singular) => "it",
            (None, Plural) => "they",
        })
    }

    fn say_all(&mut self, words: &[&'static str]) -> Option<()> {
        words.iter().try_for_each(|word| self.choices.say(Plain(word)))
    }
}
