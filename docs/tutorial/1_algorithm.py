# %% [markdown]
# # 1_algorithm

# %%
print(1)
