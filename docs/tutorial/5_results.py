# %% [markdown]
# # 5_results

# %%
print(1)
