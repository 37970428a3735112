"""Circuits in trained models. circuit.py finds them; from Python, these names open models and circuits."""
from circuits.loaded import Loaded, Place, load
from circuits.saved import Circuit, load_circuit

__all__ = ["Circuit", "Loaded", "Place", "load", "load_circuit"]
