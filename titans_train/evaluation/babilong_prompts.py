"""BABILong's prompts for its tasks qa1 to qa5, word for word, and a general one for the others.

Their texts are those of the benchmark (arXiv 2406.10149; github.com/booydar/babilong, Apache License 2.0): results
with others do not compare. Where it asks for an answer in a sentence, the sentence is begun, as in
its examples, so that what is left to say is the target.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LOCATIONS = (
    "I give you context with the facts about locations and actions of different persons hidden in some random text "
    "and a question.{gap}You need to answer the question based only on the information from the facts.\n"
    "If a person got an item in the first location and travelled to the second location the item is also in the second "
    "location. If a person dropped an item in the first location and moved to the second location the item remains in "
    "the first location."
)
_FACTS = "You need to answer the question based only on the information from the facts."
_ALWAYS = "Always return your answer in the following format: "
_NOTHING_ELSE = "Do not write anything else after that."


@dataclass(frozen=True)
class Prompt:
    instruction: str
    examples: tuple[tuple[str, str], ...]  # facts with question, answer
    format: str
    question: str = ""  # regular expression
    lead: str = ""  # the answer's beginning, with what the expression found; "": nothing is begun
    between: str = "\n"  # examples


PROMPTS = {
    "qa1": Prompt(
        "I will give you context with the facts about positions of different persons hidden in some random text and a "
        f"question. {_FACTS} If a person was in different locations, use the latest location to answer the question.",
        (
            (
                "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony. Where is "
                "Charlie?",
                "The most recent location of Charlie is balcony.",
            ),
            (
                "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse travelled to "
                "balcony. Where is Alan?",
                "The most recent location of Alan is shop.",
            ),
        ),
        f"{_ALWAYS}The most recent location of ’person’ is ’location’. {_NOTHING_ELSE}",
        r"Where is (.+?) ?\?",
        " The most recent location of {0} is",
        "\n\n",
    ),
    "qa2": Prompt(
        _LOCATIONS.format(gap=""),
        (
            (
                "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. Where is the bottle?",
                "The bottle is in the balcony.",
            ),
            (
                "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. Where is the screw "
                "driver?",
                "The screw driver is in the kitchen.",
            ),
        ),
        f"{_ALWAYS}The ’item’ is in ’location’. {_NOTHING_ELSE}",
        r"Where is the (.+?) ?\?",
        " The {0} is in the",
    ),
    "qa3": Prompt(
        _LOCATIONS.format(gap=" "),
        (
            (
                "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. Daniel "
                "journeyed to the bedroom. Daniel moved to the garden. Mary travelled to the kitchen. Where was the "
                "apple before the kitchen?",
                "Before the kitchen the apple was in the bathroom.",
            ),
            (
                "John went back to the bedroom. John went back to the garden. John went back to the kitchen. Sandra "
                "took the football. Sandra travelled to the garden. Sandra journeyed to the bedroom. Where was the "
                "football before the bedroom?",
                "Before the bedroom the football was in the garden.",
            ),
        ),
        f"{_ALWAYS}Before the $location_1$ the $item$ was in the $location_2$. {_NOTHING_ELSE}",
        r"Where was the (.+?) before the (.+?) ?\?",
        " Before the {1} the {0} was in the",
    ),
    "qa4": Prompt(
        "I will give you context with the facts about different people, their location and actions, hidden in some "
        f"random text and a question. {_FACTS}",
        (
            (
                "The hallway is south of the kitchen. The bedroom is north of the kitchen. What is the kitchen south "
                "of?",
                "bedroom",
            ),
            (
                "The garden is west of the bedroom. The bedroom is west of the kitchen. What is west of the bedroom?",
                "garden",
            ),
        ),
        f"Your answer should contain only one word - location. {_NOTHING_ELSE}",
    ),
    "qa5": Prompt(
        "I will give you context with the facts about locations and their relations hidden in some random text and a "
        f"question. {_FACTS}",
        (
            (
                "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. Bill took "
                "the milk there. Who did Mary give the apple to?",
                "Fred",
            ),
            (
                "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk there. Bill "
                "travelled to the bedroom. Who gave the football?",
                "Jeff",
            ),
            (
                "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the bedroom. Jeff "
                "went back to the garden. What did Fred give to Bill?",
                "apple",
            ),
        ),
        f"Your answer should contain only one word. {_NOTHING_ELSE} Do not explain your answer.",
    ),
}
GENERAL = Prompt(
    f"I will give you context with the facts hidden in some random text and a question. {_FACTS}",
    (),
    f"Your answer should contain only one word. {_NOTHING_ELSE} Do not explain your answer.",
)
STYLES = ("original", "bare")


def around(task: str, question: str, style: str = "original") -> tuple[str, str]:
    """What stands before the context and after it, up to where the target (with a space before it) is expected.

    style "original": instruction, examples and format of the answer before the context; "bare": nothing of these, and
    no sentence is begun.
    """
    question = question.strip()
    end = f"\n</context>\n\nQuestion: {question}\nAnswer:"
    if style == "bare":
        return "<context>\n", end
    prompt = PROMPTS.get(task, GENERAL)
    shown = [f"<example>\n{facts}\nAnswer: {answer}\n</example>" for facts, answer in prompt.examples]
    before = f"{prompt.instruction}\n\n{prompt.between.join(shown)}\n\n{prompt.format}\n\n<context>\n"
    found = re.fullmatch(prompt.question, question) if prompt.lead else None
    return before, end + (prompt.lead.format(*found.groups()) if found else "")
