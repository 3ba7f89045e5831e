# empty: with it this folder, not an installed package named data, answers to `import data`
