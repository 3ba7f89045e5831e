# an empty module: it makes this folder, not an installed package named data, answer to `import data`
