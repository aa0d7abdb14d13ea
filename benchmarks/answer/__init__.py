"""Does the sentence that an explanation begins with keep its promise?"""
