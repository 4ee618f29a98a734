"""What to search for: a topic's terms, by language and category.

The built-in table is heat, in the 14 languages the regions are asked in. Another topic comes from a TOML file:

    [en]                                          # one table per language, ISO 639-1
    weather = ["heatwave", "hot winds"]           # one list per category, the most telling term first
    health = ["heatstroke"]

Rules:

- the first terms of each category matter most: where a query is too long, terms go from the end;
- a term is at most 60 characters, so that a query for one term and one district fits every source;
- categories are the file's own, and need not be the same in every language.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import Final

__all__ = ["HEAT", "MAX_TERM", "Terms", "load_terms"]

MAX_TERM: Final = 60


class Terms:
    """Search terms by language and category; immutable.

    Args:
        table: language -> category -> terms, the most telling first.

    Raises:
        ValueError: a part of the table is empty, malformed or too long; the message says which.
    """

    __slots__ = ("_table",)

    def __init__(self, table: Mapping[str, Mapping[str, Iterable[str]]]) -> None:
        self._table = {language: _categories(language, lists) for language, lists in _named(table, "the terms")}

    def __repr__(self) -> str:
        return f"Terms({', '.join(self._table)})"

    @property
    def languages(self) -> frozenset[str]:
        """The languages that have terms."""
        return frozenset(self._table)

    def categories(self, language: str) -> tuple[str, ...]:
        """The categories of a language, in their order."""
        return tuple(self._table[language])

    def of(self, language: str, category: str) -> tuple[str, ...]:
        """The terms of one category."""
        return self._table[language][category]

    def broad(self, language: str) -> tuple[str, ...]:
        """The terms of all categories, each category's first before any one's second, none twice."""
        rounds = zip_longest(*self._table[language].values())
        return tuple(dict.fromkeys(term for term in chain.from_iterable(rounds) if term is not None))


def load_terms(path: str | Path) -> Terms:
    """The terms in a TOML file of the form shown above.

    Raises:
        ValueError: it cannot be read, is not TOML, or not of that form; the message names the file and the place.
    """
    try:
        with open(path, "rb") as file:
            return Terms(tomllib.load(file))
    except OSError as error:
        raise ValueError(f"cannot read terms file {path}: {error.strerror}") from error
    except ValueError as error:  # tomllib's own and UnicodeDecodeError are ValueErrors too
        raise ValueError(f"terms file {path}: {error}") from error


def _categories(language: str, lists: object) -> dict[str, tuple[str, ...]]:
    if not (len(language) in (2, 3) and language.isascii() and language.islower()):
        raise ValueError(f"language {language!r} must be an ISO 639 code such as 'en'")
    return {category: _terms(f"{language}.{category}", terms) for category, terms in _named(lists, f"[{language}]")}


def _named(table: object, where: str) -> Iterable[tuple[str, object]]:
    if not isinstance(table, Mapping) or not table:
        raise ValueError(f"{where} must be a table with at least one entry")
    return table.items()


def _terms(where: str, terms: object) -> tuple[str, ...]:
    if isinstance(terms, str) or not isinstance(terms, Iterable):
        raise ValueError(f"{where} must be a list of terms, not {terms!r}")
    checked = tuple(_term(where, term) for term in terms)
    if not checked:
        raise ValueError(f"{where} must have at least one term")
    return checked


def _term(where: str, term: object) -> str:
    if not isinstance(term, str) or not term.strip():
        raise ValueError(f"{where}: a term must be text, not {term!r}")
    if '"' in term or any(ord(char) < 32 for char in term):
        raise ValueError(f"{where}: {term!r} has quotes or control characters; a phrase is quoted for you")
    if len(term) > MAX_TERM:
        raise ValueError(f"{where}: {term!r} has {len(term)} characters, at most {MAX_TERM} are allowed")
    return term.strip()


HEAT: Final = Terms({
    "en": {
        "weather": ["heatwave", "heat wave", "hot winds", "scorching heat"],
        "health": ["heatstroke", "heat stroke", "dehydration", "heat exhaustion"],
        "temperature": ["temperature", "mercury", "maximum temperature"],
        "governance": ["heat alert", "heat action plan", "heat advisory"],
    },
    "hi": {
        "weather": ["लू", "हीटवेव", "भीषण गर्मी", "गर्म हवाएं"],
        "health": ["हीटस्ट्रोक", "लू लगना", "लू से मौत", "निर्जलीकरण"],
        "temperature": ["तापमान", "पारा", "अधिकतम तापमान"],
        "governance": ["लू अलर्ट", "हीट एक्शन प्लान", "ऑरेंज अलर्ट"],
    },
    "ur": {
        "weather": ["ہیٹ ویو", "شدید گرمی", "گرمی کی لہر"],
        "health": ["ہیٹ اسٹروک", "لو لگنا", "پانی کی کمی"],
        "temperature": ["درجہ حرارت", "پارہ", "ریکارڈ گرمی"],
        "governance": ["ہیٹ الرٹ", "گرمی کا الرٹ", "اسکول بند"],
    },
    "ta": {
        "weather": ["வெப்ப அலை", "கடும் வெயில்", "அனல் காற்று"],
        "health": ["வெயில் பாதிப்பு", "வெப்ப பக்கவாதம்", "நீரிழப்பு"],
        "temperature": ["வெப்பநிலை", "அதிகபட்ச வெப்பநிலை", "டிகிரி செல்சியஸ்"],
        "governance": ["வெப்ப எச்சரிக்கை", "ஆரஞ்சு எச்சரிக்கை", "பள்ளிகளுக்கு விடுமுறை"],
    },
    "bn": {
        "weather": ["তাপপ্রবাহ", "দাবদাহ", "তীব্র গরম"],
        "health": ["হিটস্ট্রোক", "হিট স্ট্রোক", "জলশূন্যতা"],
        "temperature": ["তাপমাত্রা", "পারদ", "সর্বোচ্চ তাপমাত্রা"],
        "governance": ["কমলা সতর্কতা", "তাপপ্রবাহের সতর্কতা", "স্কুল ছুটি"],
    },
    "te": {
        "weather": ["వడగాల్పులు", "ఎండలు", "వడ గాలులు"],
        "health": ["వడదెబ్బ", "ఎండ దెబ్బ", "డీహైడ్రేషన్"],
        "temperature": ["ఉష్ణోగ్రత", "ఉష్ణోగ్రతలు", "గరిష్ఠ ఉష్ణోగ్రత"],
        "governance": ["ఆరెంజ్ అలర్ట్", "వడగాల్పుల హెచ్చరిక", "పాఠశాలలకు సెలవు"],
    },
    "pa": {
        "weather": ["ਲੂ", "ਹੀਟ ਵੇਵ", "ਭਿਆਨਕ ਗਰਮੀ", "ਗਰਮੀ ਦੀ ਲਹਿਰ"],
        "health": ["ਹੀਟ ਸਟ੍ਰੋਕ", "ਲੂ ਲੱਗਣਾ", "ਪਾਣੀ ਦੀ ਕਮੀ"],
        "temperature": ["ਤਾਪਮਾਨ", "ਪਾਰਾ", "ਵੱਧ ਤੋਂ ਵੱਧ ਤਾਪਮਾਨ"],
        "governance": ["ਹੀਟ ਅਲਰਟ", "ਗਰਮੀ ਦਾ ਅਲਰਟ", "ਸਕੂਲ ਬੰਦ"],
    },
    "mr": {
        "weather": ["उष्णतेची लाट", "कडक ऊन", "उष्ण वारे"],
        "health": ["उष्माघात", "उष्माघाताचा बळी", "निर्जलीकरण"],
        "temperature": ["तापमान", "पारा", "कमाल तापमान"],
        "governance": ["उष्णतेचा इशारा", "ऑरेंज अलर्ट", "शाळांना सुट्टी"],
    },
    "ml": {
        "weather": ["ഉഷ്ണതരംഗം", "കടുത്ത ചൂട്", "കൊടും ചൂട്"],
        "health": ["സൂര്യാഘാതം", "സൂര്യാതപം", "നിർജലീകരണം"],
        "temperature": ["താപനില", "ഉയർന്ന താപനില", "ഡിഗ്രി സെൽഷ്യസ്"],
        "governance": ["ഓറഞ്ച് അലർട്ട്", "ചൂട് മുന്നറിയിപ്പ്", "സ്കൂൾ അവധി"],
    },
    "gu": {
        "weather": ["હીટવેવ", "ગરમીનું મોજું", "કાળઝાળ ગરમી"],
        "health": ["હીટસ્ટ્રોક", "લૂ લાગવી", "ડિહાઇડ્રેશન"],
        "temperature": ["તાપમાન", "પારો", "મહત્તમ તાપમાન"],
        "governance": ["ઓરેન્જ એલર્ટ", "ગરમીનું એલર્ટ", "હીટ એક્શન પ્લાન"],
    },
    "kn": {
        "weather": ["ಬಿಸಿಗಾಳಿ", "ಬಿಸಿಲಿನ ತಾಪ", "ಸುಡು ಬಿಸಿಲು"],
        "health": ["ಶಾಖಾಘಾತ", "ಬಿಸಿಲಿನ ಹೊಡೆತ", "ನಿರ್ಜಲೀಕರಣ"],
        "temperature": ["ತಾಪಮಾನ", "ಉಷ್ಣಾಂಶ", "ಗರಿಷ್ಠ ತಾಪಮಾನ"],
        "governance": ["ಆರೆಂಜ್ ಅಲರ್ಟ್", "ಬಿಸಿಗಾಳಿ ಎಚ್ಚರಿಕೆ", "ಶಾಲೆಗಳಿಗೆ ರಜೆ"],
    },
    "as": {
        "weather": ["তাপপ্ৰবাহ", "প্ৰচণ্ড গৰম", "তীব্ৰ গৰম"],
        "health": ["হিট ষ্ট্ৰোক", "গৰমত মৃত্যু", "নিৰ্জলীকৰণ"],
        "temperature": ["তাপমাত্ৰা", "উষ্ণতা", "সৰ্বোচ্চ তাপমাত্ৰা"],
        "governance": ["কমলা সতৰ্কবাণী", "তাপপ্ৰবাহৰ সতৰ্কবাণী", "বিদ্যালয় বন্ধ"],
    },
    "or": {
        "weather": ["ଗ୍ରୀଷ୍ମପ୍ରବାହ", "ପ୍ରବଳ ଗରମ", "ଝାଞ୍ଜି"],
        "health": ["ଅଂଶୁଘାତ", "ହିଟ୍ ଷ୍ଟ୍ରୋକ୍", "ଜଳହୀନତା"],
        "temperature": ["ତାପମାତ୍ରା", "ପାରଦ", "ସର୍ବାଧିକ ତାପମାତ୍ରା"],
        "governance": ["ଅରେଞ୍ଜ ଆଲର୍ଟ", "ଗରମ ସତର୍କତା", "ସ୍କୁଲ ଛୁଟି"],
    },
    "ne": {
        "weather": ["तातो हावा", "चर्को गर्मी", "अत्यधिक गर्मी"],
        "health": ["हिट स्ट्रोक", "लू लाग्नु", "जलवियोजन"],
        "temperature": ["तापक्रम", "तापमान", "अधिकतम तापक्रम"],
        "governance": ["गर्मीको चेतावनी", "सतर्कता", "विद्यालय बन्द"],
    },
})
