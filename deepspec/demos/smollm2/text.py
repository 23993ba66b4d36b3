"""Chat prompts in English from tables: what people ask an assistant, as asks crossed with topics.

Every ask is a sentence with one or more gaps; a gap is filled from the table of its name. The tables are our own, so
that the prompts carry nobody's licence, and none of them is taken from an evaluation task.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

TABLES: dict[str, tuple[str, ...]] = {
    "science": (
        "photosynthesis", "gravity", "the water cycle", "electric current", "how vaccines work", "plate tectonics",
        "black holes", "how rainbows form", "natural selection", "the immune system", "how magnets work", "inflation",
        "the greenhouse effect", "how batteries store energy", "DNA", "the phases of the moon", "how sound travels",
        "supply and demand", "how the heart pumps blood", "friction", "why the sky is blue", "volcanoes", "atoms",
        "how airplanes fly", "the food chain", "how a bill becomes a law", "machine learning", "how the internet works",
        "compound interest", "tides", "how bees make honey", "the carbon cycle", "how glass is made", "probability",
    ),
    "activity": (
        "learning a new language", "saving money", "sleeping better", "starting a garden", "running a first marathon",
        "giving a speech", "studying for an exam", "cooking for a family", "working from home", "moving to a new city",
        "training a puppy", "reading more books", "reducing stress", "packing for a trip", "writing a resume",
        "making new friends", "taking better photos", "keeping a house clean", "learning to swim", "hosting a dinner",
        "managing time", "preparing for a job interview", "eating healthier", "growing tomatoes", "riding a bicycle",
        "playing the guitar", "camping in the rain", "organizing a closet", "painting a room", "fixing a flat tire",
    ),
    "thing": (
        "a lighthouse", "the first snow", "an old bicycle", "a quiet library", "a lost umbrella", "the sea at night",
        "a brave little robot", "a market in the morning", "a grandmother's kitchen", "a train through the mountains",
        "a cat who wanted to fly", "an empty theater", "a letter that arrived late", "a garden on a roof", "autumn",
        "a dragon who was afraid of fire", "two neighbors and a fence", "a clock that ran backwards", "a summer storm",
        "a baker in a small town", "a violin without strings", "an astronaut far from home", "a street musician",
        "a forgotten map", "a river that spoke", "the last day of school", "a curious fox", "a lamp in the window",
    ),
    "person": (
        "my manager", "a customer", "my landlord", "a teacher", "a colleague", "an old friend", "my neighbor",
        "the school office", "a hotel", "a travel agency", "a new team member", "the city library", "my doctor",
        "a local newspaper", "a bank", "a supplier", "my sports team", "a volunteer group", "the internet provider",
    ),
    "matter": (
        "a delayed delivery", "a day off next Friday", "a broken heater", "a meeting that must move", "a thank-you",
        "a late invoice", "a noisy party", "a lost package", "a change of address", "feedback on a draft",
        "a birthday party", "a wrong bill", "an apology for being late", "an invitation to lunch", "a job offer",
        "a canceled booking", "help with a project", "a question about opening hours", "a membership renewal",
    ),
    "pair": (
        "a virus and a bacterium", "weather and climate", "a crocodile and an alligator", "speed and velocity",
        "a simile and a metaphor", "stocks and bonds", "a lake and a pond", "RAM and a hard drive", "baking and frying",
        "a list and a tuple in Python", "TCP and UDP", "mass and weight", "a novel and a short story", "jam and jelly",
        "a city and a town", "fruits and vegetables", "a debit card and a credit card", "a frog and a toad",
        "Java and JavaScript", "a recipe and a menu", "empathy and sympathy", "a stack and a queue", "HTTP and HTTPS",
        "renewable and non-renewable energy", "an asteroid and a comet", "a lease and a mortgage", "tea and coffee",
        "a compiler and an interpreter", "a mean and a median", "active and passive voice", "a symptom and a disease",
    ),
    "place": (
        "Paris", "Tokyo", "Rome", "the Grand Canyon", "Iceland", "New York", "Egypt", "the Amazon rainforest", "Kenya",
        "Venice", "Australia", "the Alps", "Istanbul", "Mexico City", "Norway", "India", "Barcelona", "Cape Town",
        "Vietnam", "the Great Wall of China", "Peru", "Scotland", "Hawaii", "Berlin", "New Zealand", "Morocco",
    ),
    "history": (
        "the printing press", "the steam engine", "the Roman Empire", "the Silk Road", "the moon landing", "money",
        "the telephone", "the Olympic Games", "the industrial revolution", "chess", "the calendar", "writing", "maps",
        "the Renaissance", "the bicycle", "coffee", "chocolate", "the French Revolution", "the computer", "medicine",
        "ancient Egypt", "the Vikings", "photography", "the alphabet", "railways", "the compass", "tea", "theater",
    ),
    "dish": (
        "pancakes", "tomato soup", "a vegetable curry", "banana bread", "an omelette", "fried rice", "a Greek salad",
        "lasagna", "chocolate chip cookies", "guacamole", "roasted potatoes", "a lentil stew", "apple pie", "pizza",
        "a smoothie", "pumpkin soup", "pasta with garlic", "a tuna sandwich", "oatmeal", "mushroom risotto", "tacos",
    ),
    "reader": (
        "a ten-year-old", "a beginner", "a college student", "someone in a hurry", "my grandmother", "a colleague",
        "a child", "a curious friend", "a new employee", "an engineer",
    ),
    "opinion": (
        "learning to code in school", "working four days a week", "living in a big city", "reading paper books",
        "having a pet", "public transport", "remote work", "social media", "school uniforms", "electric cars",
        "buying second-hand clothes", "homework", "video games", "nuclear power", "space exploration", "online classes",
        "zoos", "fast food", "owning a car", "artificial intelligence", "tourism", "eating less meat", "exams",
    ),
    "group": (
        "colors", "animals that live in the sea", "musical instruments", "healthy snacks",
        "things to do on a rainy day", "countries in Europe", "books for children", "sports for two people",
        "jobs in a hospital", "trees", "planets",
        "ways to say thank you", "famous inventions", "things to take to the beach", "board games", "spices", "birds",
        "programming languages", "kitchen tools", "gifts for a friend", "adjectives for a good leader", "flowers",
        "questions to ask in an interview", "habits of good students", "names for a cat", "African countries",
    ),
    "code": (
        "reverses a string", "checks whether a number is prime", "counts the vowels in a word", "sorts a list of names",
        "removes duplicates from a list", "finds the largest number in a list", "computes the factorial of n",
        "converts Celsius to Fahrenheit", "checks whether a word is a palindrome", "returns the nth Fibonacci number",
        "merges two dictionaries", "counts the words in a text", "reads a CSV file", "flattens a nested list",
        "computes the average of a list", "finds the common items of two lists", "draws a triangle of stars",
        "rolls two dice", "validates an email address", "reads a file line by line", "finds the longest word",
        "computes the area of a circle", "swaps keys and values of a dictionary", "generates a random password",
        "searches a sorted list", "counts how often each letter occurs", "transposes a matrix", "prints a calendar",
        "rotates a list by k places", "checks whether two words are anagrams", "turns a number into Roman numerals",
    ),
    "language": ("Python", "Python", "Python", "JavaScript", "C", "Java", "Rust", "SQL", "a shell script"),
    "tone": ("short", "friendly", "formal", "funny", "polite", "warm", "simple"),
    "count": ("three", "four", "five", "six", "seven"),
    "word": (
        "gratitude", "resilience", "ambiguous", "meticulous", "serendipity", "pragmatic", "nostalgia", "eloquent",
        "integrity", "frugal", "tedious", "curious", "inevitable", "candid", "diligent", "obscure", "vivid",
        "reluctant", "abundant", "humble", "persuade", "hesitate", "coherent", "subtle", "genuine", "thrive", "paradox",
        "empathy",
    ),
    "product": (
        "a water bottle", "a travel app", "a coffee shop", "an online bookstore", "a bicycle repair shop", "a backpack",
        "a music school", "a bakery", "a language course", "a yoga studio", "an electric scooter", "a garden center",
        "a pet food brand", "a wooden toy", "a cleaning service", "a podcast about history", "a board game cafe",
    ),
}  # fmt: skip

ASKS = (
    "Explain {science} to {reader}.", "Can you explain {science} in simple words?", "What is {science}, in short?",
    "Why does {science} matter?", "I do not understand {science}. Can you help me?", "Teach me about {science}.",
    "Give me {count} tips for {activity}.", "What should I know before {activity}?", "I need advice on {activity}.",
    "Make a plan for {activity} in one month.", "What are common mistakes when {activity}?",
    "Write a {tone} poem about {thing}.", "Tell me a story about {thing}.", "Write a story for {reader} about {thing}.",
    "Describe {thing} in one paragraph.", "Write the opening of a novel about {thing}.", "Write a haiku about {thing}.",
    "Write a {tone} email to {person} about {matter}.", "Help me write a message to {person} about {matter}.",
    "What is the difference between {pair}?", "Compare {pair} for {reader}.", "How do I tell {pair} apart?",
    "What should I see in {place}?", "Plan a weekend in {place}.", "Tell me {count} facts about {place}.",
    "When is the best time to visit {place}?", "Write a {tone} travel note about {place}.",
    "Tell me about the history of {history}.", "How did {history} change the world?", "Who made {history} important?",
    "How do I make {dish}?", "Give me a {tone} recipe for {dish}.", "What do I need to cook {dish} for four people?",
    "What are the advantages and disadvantages of {opinion}?", "Write a paragraph that argues for {opinion}.",
    "Is {opinion} a good idea?", "Write {count} questions for a debate about {opinion}.",
    "List {count} {group}.", "Name {count} {group} and say one sentence about each.", "Can you list some {group}?",
    "Write a function in {language} that {code}.", "How do I write a program in {language} that {code}?",
    "Show me {language} code that {code}, with comments.", "Explain step by step how a program {code}.",
    "Use the word {word} in {count} sentences.", "What does {word} mean?", "Give me synonyms of {word}.",
    "Write a slogan for {product}.", "Write a {tone} advertisement for {product}.", "Who would buy from {product}?",
    "Write a dialogue between {person} and {reader} about {opinion}.", "Quiz me about {science}.",
    "Act as a guide in {place} and greet a group of visitors.", "Summarize {history} in {count} sentences.",
)  # fmt: skip

_GAP = re.compile(r"\{(\w+)\}")


def chat_prompts(seed: int) -> Iterator[str]:
    """Prompts without end: the asks in shuffled rounds, their gaps filled at random."""
    rng = random.Random(f"deepspec real chat {seed}")
    asks = list(ASKS)
    while True:
        rng.shuffle(asks)
        for ask in asks:
            yield _GAP.sub(lambda gap: rng.choice(TABLES[gap[1]]), ask)
