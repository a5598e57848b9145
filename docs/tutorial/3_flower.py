# %% [markdown]
# # 3_flower

# %%
print(1)
