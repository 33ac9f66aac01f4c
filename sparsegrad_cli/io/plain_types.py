"""The types of values in plain words, for the errors of recipes and records. No imports."""

# Kinds of pydantic errors -> what was expected.
PLAIN_TYPES = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "string_unicode": "a text in Unicode",
    "list_type": "a list",
    "tuple_type": "a list",
}
