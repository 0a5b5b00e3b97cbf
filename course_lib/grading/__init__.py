"""The machinery behind `check`: what an exercise is, how it is judged, who grades the grader.

The exercises themselves live in `course_lib.checks`, one file per chapter.
"""
