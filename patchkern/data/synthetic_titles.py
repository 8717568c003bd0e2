# SPDX-License-Identifier: Apache-2.0
"""Titles for synthetic items: ordinary words, each of one genre only, so that whoever reads a title knows its genre."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Words(NamedTuple):
    """The words of one genre."""

    qualities: tuple[str, ...]
    """stand before a figure or a place"""
    figures: tuple[str, ...]
    """who or what a story is about, in the singular"""
    places: tuple[str, ...]
    """where or at what occasion it happens, in the singular"""


def _words(qualities: str, figures: str, places: str) -> Words:
    return Words(tuple(qualities.split()), tuple(figures.split()), tuple(places.split()))


GENRES: dict[str, Words] = {
    "western": _words(
        "Dusty Lonesome Rawhide Sagebrush Sundown Buckskin Gunsmoke Tumbleweed Sunburnt Leather Branded Western "
        "Spurred Untamed",
        "Sheriff Outlaw Gunslinger Cowboy Marshal Rancher Drifter Deputy Mustang Coyote Rustler Stagecoach "
        "Wrangler Bandit Prospector Revolver Trapper Bronco",
        "Saloon Canyon Ranch Prairie Mesa Corral Homestead Gulch Frontier Trail Gallows Goldmine Badland Creek",
    ),
    "space": _words(
        "Orbital Stellar Galactic Lunar Interstellar Cosmic Martian Weightless Robotic Alien Atomic Solar Quantum "
        "Hyperspace",
        "Astronaut Android Starship Cosmonaut Robot Comet Cyborg Satellite Clone Rocket Spaceman Probe Shuttle "
        "Meteor Mutant Spacesuit Asteroid Computer",
        "Galaxy Planet Nebula Airlock Wormhole Moonbase Supernova Colony Crater Constellation Universe Orbit "
        "Spaceport Pulsar",
    ),
    "romance": _words(
        "Tender Blushing Sweet Passionate Beloved Jealous Wedded Amorous Romantic Heartbroken Scandalous Moonlit "
        "Lovesick Unrequited",
        "Bride Sweetheart Kiss Suitor Valentine Bridegroom Lover Darling Heiress Matchmaker Bachelor Rose Bouquet "
        "Governess Duchess Debutante Proposal Admirer",
        "Ballroom Wedding Honeymoon Altar Courtship Engagement Rosegarden Gazebo Balcony Boudoir Heart Embrace "
        "Summerhouse Elopement",
    ),
    "crime": _words(
        "Guilty Stolen Crooked Homicidal Forged Suspicious Unsolved Corrupt Criminal Poisoned Ruthless Missing "
        "Bloodstained Anonymous",
        "Detective Burglar Gangster Inspector Alibi Witness Murderer Suspect Thief Mobster Blackmailer Fingerprint "
        "Forger Hitman Jewel Pickpocket Sleuth Informer",
        "Precinct Courtroom Heist Jailhouse Alley Pawnshop Verdict Underworld Prison Robbery Speakeasy Warehouse "
        "Murder Getaway",
    ),
    "horror": _words(
        "Haunted Undead Ghostly Screaming Cursed Rotting Headless Crawling Ghastly Unholy Sinister Grisly Demonic "
        "Creeping",
        "Vampire Ghost Zombie Werewolf Demon Skeleton Ghoul Phantom Poltergeist Nightmare Exorcist Scarecrow "
        "Spider Corpse Undertaker Banshee Specter Slasher",
        "Crypt Graveyard Mausoleum Asylum Coffin Cellar Attic Seance Morgue Cemetery Catacomb Grave Basement "
        "Necropolis",
    ),
    "fantasy": _words(
        "Enchanted Magic Elven Mystic Fabled Spellbound Winged Runic Bewitched Mythic Dwarven Crystal Charmed "
        "Prophesied",
        "Dragon Wizard Unicorn Elf Sorceress Goblin Troll Griffin Dwarf Enchantress Changeling Warlock Phoenix "
        "Talisman Ogre Pixie Amulet Mage",
        "Kingdom Castle Spellbook Citadel Realm Portal Dungeon Prophecy Grotto Tower Glade Moat Cauldron Quest",
    ),
    "war": _words(
        "Wounded Fallen Armored Besieged Valiant Victorious Camouflaged Decorated Marching Embattled Defeated "
        "Heroic Conscripted Airborne",
        "Soldier General Sergeant Tank Sniper Paratrooper Regiment Bomber Colonel Veteran Medic Rifleman Grenade "
        "Infantryman Prisoner Corporal Commando Bugler",
        "Battlefield Trench Bunker Barracks Siege Front Blitz Beachhead Armistice Bridgehead Minefield Garrison "
        "Offensive Outpost",
    ),
    "sea": _words(
        "Drowned Briny Stormy Shipwrecked Seafaring Sunken Becalmed Marooned Tidal Nautical Oceanic Foaming "
        "Barnacled Castaway",
        "Pirate Sailor Mermaid Captain Whale Buccaneer Kraken Schooner Helmsman Octopus Harpooner Seagull Admiral "
        "Albatross Fisherman Corsair Galleon Bosun",
        "Lagoon Harbor Reef Island Lighthouse Shipwreck Ocean Whirlpool Tide Cove Shoal Wharf Maelstrom Estuary",
    ),
    "sport": _words(
        "Undefeated Athletic Olympic Sprinting Amateur Unbeaten Winning Sweaty Benched Sporting Overtime Tackling "
        "Seeded Muscular",
        "Champion Goalkeeper Boxer Quarterback Referee Sprinter Wrestler Coach Striker Gymnast Pitcher Cyclist "
        "Swimmer Umpire Underdog Athlete Rookie Batter",
        "Stadium Gymnasium Tournament Playoff Marathon Championship Halftime Penalty Scoreboard Dugout Trophy "
        "League Podium Knockout",
    ),
    "music": _words(
        "Jazzy Electric Acoustic Melodic Unplugged Orchestral Rhythmic Harmonic Singing Syncopated Offbeat Soulful "
        "Operatic Lyrical",
        "Drummer Violin Trumpet Guitarist Pianist Soprano Fiddler Saxophone Composer Banjo Tenor Crooner Organist "
        "Harp Cellist Songbird Conductor Troubadour",
        "Symphony Melody Concert Ballad Nightclub Chorus Waltz Serenade Overture Jukebox Encore Sonata Opera Bandstand",
    ),
    "cooking": _words(
        "Spicy Buttered Roasted Salty Sugared Simmering Delicious Pickled Peppered Caramel Crunchy Candied Toasted "
        "Savory",
        "Chef Baker Pastry Waiter Dumpling Truffle Butcher Lobster Gourmet Pumpkin Noodle Pancake Onion Winemaker "
        "Sourdough Muffin Apricot Omelet",
        "Kitchen Bakery Recipe Banquet Feast Bistro Pantry Cookbook Supper Restaurant Vineyard Diner Orchard Picnic",
    ),
    "spies": _words(
        "Undercover Covert Classified Encrypted Clandestine Disguised Coded Secret Bugged Diplomatic Untraceable "
        "Double Elusive Traitorous",
        "Agent Spy Mole Assassin Saboteur Courier Ambassador Defector Cipher Spymaster Dossier Microfilm Operative "
        "Turncoat Interpreter Decoy Handler Codebreaker",
        "Embassy Safehouse Checkpoint Mission Conspiracy Briefing Rendezvous Border Ministry Wiretap Interrogation "
        "Protocol Archive Consulate",
    ),
    "antiquity": _words(
        "Roman Imperial Ancient Trojan Bronze Spartan Egyptian Marble Greek Persian Babylonian Pharaonic Byzantine "
        "Etruscan",
        "Gladiator Emperor Pharaoh Centurion Senator Chariot Philosopher Vestal Consul Sphinx Legionary Mummy "
        "Charioteer Caesar Scribe Oracle Minotaur Archer",
        "Colosseum Pyramid Temple Forum Empire Acropolis Obelisk Aqueduct Dynasty Villa Papyrus Agora Labyrinth "
        "Sarcophagus",
    ),
    "animals": _words(
        "Furry Feathered Tropical Striped Nocturnal Migrating Prowling Purring Verdant Mossy Leafy Hibernating "
        "Tame Spotted",
        "Tiger Elephant Otter Fox Badger Hedgehog Panda Parrot Gorilla Beaver Owl Leopard Zebra Squirrel Penguin "
        "Lioness Crocodile Toucan",
        "Jungle Meadow Rainforest Burrow Savanna Thicket Swamp Nest Waterhole Woodland Marsh Den Riverbank Treetop",
    ),
    "school": _words(
        "Graduating Studious Giggling Mischievous Bookish Tardy Absentminded Teenage Expelled Freckled Truant "
        "Boarding Honorary Scholarly",
        "Teacher Schoolboy Headmaster Librarian Classmate Professor Prefect Tutor Freshman Janitor Prankster Bully "
        "Roommate Student Principal Pupil Sophomore Schoolgirl",
        "Classroom Homework Playground Academy Examination Campus Blackboard Library Recess Dormitory Cafeteria "
        "Semester Detention Reunion",
    ),
    "travel": _words(
        "Diesel Steam Speeding Hitchhiking Runaway Derailed Delayed Express Homebound Turbocharged "
        "Transcontinental Overnight Motorized Scenic",
        "Locomotive Trucker Passenger Hitchhiker Motorcycle Stoker Chauffeur Tourist Backpacker Convertible "
        "Caravan Stationmaster Mechanic Suitcase Tram Cabdriver Engine Commuter",
        "Highway Railway Motel Station Crossroad Tunnel Terminal Viaduct Roadhouse Garage Platform Junction Detour "
        "Turnpike",
    ),
}
"""Genre -> its words. No word is in two lists."""

_GENRE_OF = {word: genre for genre, lists in GENRES.items() for words in lists for word in words}

_QUALITY, _FIGURE, _PLACE = range(3)  # the lists of `Words`
_PATTERNS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("{}", (_FIGURE,)),
    ("{} {}", (_QUALITY, _FIGURE)),
    ("{} {}", (_QUALITY, _PLACE)),
    ("The {} {}", (_QUALITY, _FIGURE)),
    ("The {} {}", (_QUALITY, _PLACE)),
    ("{} and {}", (_FIGURE, _FIGURE)),
    ("{} of the {}", (_PLACE, _FIGURE)),
    ("The {} of the {}", (_FIGURE, _PLACE)),
)
_LONGER: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("{} {} {}", (_QUALITY, _QUALITY, _FIGURE)),
    ("{} {} {}", (_QUALITY, _QUALITY, _PLACE)),
    ("The {} {} {}", (_QUALITY, _QUALITY, _FIGURE)),
    ("{} {} and {}", (_QUALITY, _FIGURE, _FIGURE)),
    ("The {} {} of the {}", (_QUALITY, _FIGURE, _PLACE)),
)
_TRIES = 4  # for a short title that is still free, then for a longer one
_NUMERALS = ("", " II", " III", " IV", " V", " VI")
MAX_SERIES = len(_NUMERALS)


def titles_of(random: np.random.Generator, genre: NDArray[np.int64], sequel: NDArray[np.int64]) -> list[str]:
    """Distinct titles: "The Dusty Saloon", its sequels "The Dusty Saloon II", "The Dusty Saloon III", ...

    Short ones while there are some left, then longer ones, then two joined by a colon.

    Args:
        random: draws the words.
        genre: ``(num_items,)`` of each item, an index into `GENRES`.
        sequel: ``(num_items,)`` the item that continues each, always the next one, or -1.
    """
    own = list(GENRES.values())
    used: set[str] = set()
    titles: list[str] = []
    stem, part = "", 0
    for item, words in enumerate(own[g] for g in genre.tolist()):
        part = part + 1 if item and sequel[item - 1] == item else 0
        if part == 0:
            stem = next(stem for stem in _proposals(random, words) if stem not in used)
            used.add(stem)
        titles.append(stem + _NUMERALS[part])
    return titles


def genre_of(title: str) -> str | None:
    """The genre whose words a title is made of; None if no word is of any.

    Examples:
        >>> from patchkern.data.synthetic_titles import genre_of
        >>> genre_of("The Dusty Saloon II")
        'western'
    """
    return next((_GENRE_OF[word] for word in title.replace(":", "").split() if word in _GENRE_OF), None)


def _proposals(random: np.random.Generator, words: Words) -> Iterator[str]:
    for patterns in (_PATTERNS, _LONGER):
        for _ in range(_TRIES):
            yield _fill(random, patterns, words)
    while True:
        yield f"{_fill(random, _LONGER, words)}: {_fill(random, _LONGER, words)}"


def _fill(random: np.random.Generator, patterns: tuple[tuple[str, tuple[int, ...]], ...], words: Words) -> str:
    pattern, slots = patterns[int(random.random() * len(patterns))]
    while True:
        chosen = [words[slot][int(random.random() * len(words[slot]))] for slot in slots]
        if len(set(chosen)) == len(chosen):
            return pattern.format(*chosen)
