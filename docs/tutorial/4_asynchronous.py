# %% [markdown]
# # 4_asynchronous

# %%
print(1)
