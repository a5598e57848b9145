# %% [markdown]
# # 2_own_data

# %%
print(1)
