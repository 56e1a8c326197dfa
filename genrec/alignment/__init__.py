"""Alignment: rewards, advantages and policy losses; the trainers that use them are training.align and
training.align_thinker."""
