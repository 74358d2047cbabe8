"""What records say: numbers, intervals, answers in words, figures and pages.

Nothing of training is imported here.
"""
