"""An expert in the forms that other programs take: one file a form, `export` in front of them."""
